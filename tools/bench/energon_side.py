"""Megatron-Energon's loader over a folder of shards: images a second, as the last line of output.

Run by the interpreter of its own environment, which lacks megablip:
`python energon_side.py FOLDER DECODER WORKERS WARM_UP IMAGES`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
)

SIDE, BATCH = 384, 32


def prepare(folder: Path) -> None:
    """Energon's own index, once."""
    command = [str(Path(sys.executable).parent / "energon"), "prepare", str(folder), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
    command += ["--field-map", '{"image": "jpg", "caption": "txt"}', "--no-progress", "--num-workers", "2"]
    if not (folder / ".nv-meta").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Resize(DefaultTaskEncoder):
    """384 x 384 by torch's antialiased bicubic, in uint8: the fastest that gives Pillow's pixels."""

    def __init__(self, decoder: str):
        super().__init__()
        self.decoder = SampleDecoder(image_decode=decoder)

    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        image = sample.image
        if not isinstance(image, torch.Tensor):  # a Pillow image
            sample.image = torch.frombuffer(
                bytearray(image.convert("RGB").resize((SIDE, SIDE), 3).tobytes()), dtype=torch.uint8
            ).view(SIDE, SIDE, 3).permute(2, 0, 1).contiguous()  # fmt: skip
        else:
            resized = torch.nn.functional.interpolate(image[None], (SIDE, SIDE), mode="bicubic", antialias=True)
            sample.image = resized[0].contiguous()
        return sample


def main(folder: str, decoder: str, workers: str, warm_up: str, images: str) -> None:
    prepare(Path(folder))
    config = WorkerConfig(rank=0, world_size=1, num_workers=int(workers))
    dataset = get_train_dataset(
        folder,
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Resize(decoder),
    )
    batches = iter(get_loader(dataset, worker_config=config))
    for _ in islice(batches, int(warm_up) // BATCH):
        pass
    began, seen = time.perf_counter(), 0
    while seen < int(images):
        seen += len(next(batches).image)
    print(seen / (time.perf_counter() - began))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
