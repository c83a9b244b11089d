"""The loader: decoding one image, and images a second from shards to micro-batches.

JPEGs of 640 x 480 and 1600 x 1200 pixels with captions, each image one tile of 384 x 384.
Decoding is compared with webdataset, Pillow and transformers' SigLIP image processor in one
process, with the pixels checked; the whole loader, with two decode processes, with a
webdataset pipeline, with Megatron-Energon, and with two processes that do nothing but decode.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from transformers import SiglipImageProcessor

from megablip.data.images import NO_GRID, make_tiles
from megablip.data.shards import ShardSource
from tokenization.train import train_tokenizer
from tools.bench.core import Rival, Row, median_seconds
from tools.bench.loader_sides import LAYOUT
from tools.bench.rivals import call, venv
from tools.shard_writer import IndexedShardWriter

WORKERS, WARM_UP, IMAGES, ROUNDS = 2, 640, 2000, 3
SIZES = {"640x480": ((640, 480), 60), "1600x1200": ((1600, 1200), 16)}  # distinct images


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        shards = {name: make_shards(Path(folder) / name, *size) for name, size in SIZES.items()}
        return decode_rows(shards) + loader_rows(Path(folder), shards["640x480"])


def decode_rows(shards: dict[str, Path]) -> list[Row]:
    processor = SiglipImageProcessor(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC)
    found = []
    for name, folder in shards.items():
        path, count = str(folder / "part-0.tar"), SIZES[name][1]
        source, scaled = ShardSource(name, [path]), name == "1600x1200"

        def ours(source: ShardSource = source, count: int = count, scaled: bool = scaled) -> list[np.ndarray]:
            data = [source.read(0, number)[1]["jpg"] for number in range(count)]
            return [make_tiles(jpeg, NO_GRID, LAYOUT, dct_scaling=scaled)[0][0] for jpeg in data]

        def theirs(path: str = path, count: int = count) -> list[np.ndarray]:
            samples = webdataset.WebDataset(path, shardshuffle=False).decode("pil").slice(count)
            return [processor(sample["jpg"], return_tensors="np")["pixel_values"][0] for sample in samples]

        seconds = median_seconds({"ours": ours, "theirs": theirs})
        rival = Rival("webdataset, Pillow, SiglipImageProcessor", count / seconds["theirs"])
        goal = 4.5 if scaled else 4
        found.append(Row(f"decode_{name}", count / seconds["ours"], "images/s", "higher", goal, rival))
        if not scaled:
            levels = [
                np.abs(mine - np.rint((other + 1) * 127.5)).max() for mine, other in zip(ours(), theirs(), strict=True)
            ]
            found.append(Row(f"decode_{name}_difference", float(max(levels)), "levels", "lower", goal=1))
    return found


def loader_rows(folder: Path, shards: Path) -> list[Row]:
    corpus = folder / "corpus.txt"
    corpus.write_text("a photograph of something, number 0123456789\n" * 50)
    train_tokenizer([corpus], folder / "tokenizer", vocab_size=300)
    here = [sys.executable, "-m", "tools.bench.loader_sides"]
    energon = [
        str(venv("energon", ["torch==2.13.0", "megatron-energon"])),
        str(Path(__file__).with_name("energon_side.py")),
    ]
    sides = {
        "ours": [*here, "megablip", str(shards), str(folder / "tokenizer")],
        "decode": [*here, "decode", str(shards), str(folder / "tokenizer")],
        "webdataset, Pillow": [*here, "webdataset", str(shards), str(folder / "tokenizer")],
        "Energon, torchrgb8": [*energon, str(shards), "torchrgb8"],
        "Energon, pilrgb": [*energon, str(shards), "pilrgb"],
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):  # in turns: a busy moment of the machine falls on all of them
        for side, command in sides.items():
            rates[side].append(float(call([*command, str(WORKERS), str(WARM_UP), str(IMAGES)]).split()[-1]))
    rate = {side: statistics.median(values) for side, values in rates.items()}
    goals = {"webdataset, Pillow": 3.0, "Energon, torchrgb8": 2.0, "Energon, pilrgb": 2.0, "decode": 0.85}
    return [
        Row(f"loader_against_{side.split(',')[-1].strip()}", rate["ours"], "images/s", "higher", goal,
            Rival("decoding alone" if side == "decode" else side, rate[side]))
        for side, goal in goals.items()
    ]  # fmt: skip


def make_shards(folder: Path, size: tuple[int, int], distinct: int) -> Path:
    """Four shards of 500 captioned JPEGs, some kB for each 100 x 100 pixels as in photographs."""
    rng = np.random.default_rng(0)
    jpegs = [jpeg(rng, *size) for _ in range(distinct)]
    folder.mkdir()
    with IndexedShardWriter(str(folder / "part-%d.tar"), samples_per_shard=500) as writer:
        for number in range(2000):
            text = f"a photograph of something, number {number}"
            writer.write({"__key__": f"{number:05d}", "jpg": jpegs[number % distinct], "txt": text})
    return folder


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Noise whose amplitude falls with frequency as in photographs, a bit steeper; quality 88."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = rng.normal(size=(2, *frequency.shape)) / frequency**1.5
        channel = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (height, width))
        channels.append(255 * (channel - channel.min()) / np.ptp(channel))
    buffer = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
