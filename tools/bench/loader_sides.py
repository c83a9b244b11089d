"""Sides of the loader bench that run in this environment; each prints images a second as its last line.

`python -m tools.bench.loader_sides SIDE SHARDS TOKENIZER PROCESSES WARM_UP IMAGES`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from itertools import cycle

from megablip.config import parse_config
from megablip.data.encode import Encoder
from megablip.data.images import NO_GRID, make_tiles
from megablip.data.loader import Loader
from megablip.data.shards import ShardSource, expand_shards
from megablip.records import VisualLayout

SIDE = 384
LAYOUT = VisualLayout(tile_size=SIDE, patch_size=14, tokens_per_tile=128, grids=())


def megablip(shards: str, tokenizer: str, processes: int, warm_up: int, images: int) -> float:
    with tempfile.TemporaryDirectory() as run_dir:
        raw = {
            "stage": "pretrain",
            "run_dir": run_dir,
            "duration": "1 steps",
            "model": {"path": "none"},
            "optimizer": {"lr": 1},
            "data": {
                "sources": [{"name": "captions", "shards": shards, "schema": "caption", "weight": 1}],
                "sequence_length": 4096,
                "max_tiles": 24,
                "decode_workers": processes,
                "prefetch_bytes": 32 << 20,
            },
            "batch": {"lanes": 2},
        }
        with Loader(parse_config(raw, "bench"), tokenizer, LAYOUT, 0, 1, None) as loader:
            return rate((sum(len(m.tiles) for m in batch.micro_batches) for batch in loader), warm_up, images)


def webdataset(shards: str, tokenizer: str, processes: int, warm_up: int, images: int) -> float:
    """Decoded and resized by Pillow, as uint8, batched by 32; text tokenized as ours is."""
    import numpy as np
    import torch
    import webdataset as wds
    from PIL import Image

    encoder = Encoder(tokenizer, LAYOUT)

    def sample(pair: tuple[Image.Image, str]) -> tuple[torch.Tensor, list[int]]:
        image, text = pair
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), encoder.tokenizer.encode(text)

    dataset = wds.WebDataset(expand_shards(shards), shardshuffle=False, nodesplitter=None).repeat()
    dataset = dataset.decode("pil").to_tuple("jpg", "txt").map(sample)
    dataset = dataset.batched(32, collation_fn=lambda rows: (torch.stack([row[0] for row in rows]), rows))
    batches = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=processes)
    return rate((len(tiles) for tiles, _ in batches), warm_up, images)


def decode(shards: str, tokenizer: str, processes: int, warm_up: int, images: int) -> float:
    """Nothing but decoding, of images in memory, in several processes at once."""
    command = [sys.executable, "-m", "tools.bench.loader_sides", "decode_alone", shards, tokenizer, "1"]
    share = [str(warm_up // processes), str(images // processes)]
    running = [subprocess.Popen([*command, *share], stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0].split()[-1]) for process in running)


def decode_alone(shards: str, tokenizer: str, processes: int, warm_up: int, images: int) -> float:
    import torch

    torch.set_num_threads(1)
    source = ShardSource("captions", expand_shards(shards))
    jpegs = [source.read(0, number)[1]["jpg"] for number in range(60)]
    return rate((len(make_tiles(jpeg, NO_GRID, LAYOUT)[0]) for jpeg in cycle(jpegs)), warm_up, images)


def rate(counts, warm_up: int, images: int) -> float:
    """Images a second, of an iterator over counts of images."""
    seen = 0
    while seen < warm_up:
        seen += next(counts)
    began, seen = time.perf_counter(), 0
    while seen < images:
        seen += next(counts)
    return seen / (time.perf_counter() - began)


if __name__ == "__main__":
    name, shards, tokenizer, *numbers = sys.argv[1:]
    print(globals()[name](shards, tokenizer, *map(int, numbers)))
