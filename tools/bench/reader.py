"""Reading shards: samples as bytes, by index, beside webdataset's own reader; and walking headers.

Two data sets, one shard each: JPEG-sized members with a JSON, and small members
with a JSON.  Files are in the page cache, and no member is decoded.
"""

from __future__ import annotations

import os
import random
import tempfile
from functools import partial
from pathlib import Path

import webdataset

from megablip.data.index import open_shard
from megablip.data.shards import ShardSource
from megablip.data.tar import walk
from tools.bench.core import Rival, Row, median_seconds
from tools.shard_writer import IndexedShardWriter

JSON_BYTES = 300
DATA_SETS = {"images": (8000, 42_000), "small": (20_000, 4_000)}  # samples, bytes of the first member


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return [row for name in DATA_SETS for row in rows_of(name, Path(folder))]


def rows_of(name: str, folder: Path) -> list[Row]:
    samples, size = DATA_SETS[name]
    path = write(folder / f"{name}-%d.tar", samples, size)
    source = ShardSource(name, [path])
    in_order = list(range(source.total))
    at_random = random.Random(0).sample(in_order, len(in_order))
    sides = {
        "sequential": partial(read, source, in_order),
        "random": partial(read, source, at_random),
        "headers": partial(walk_headers, path),
        "webdataset": partial(iterate, path),
    }
    read_bytes = {side: run() for side, run in sides.items() if side != "headers"}
    if set(read_bytes.values()) != {samples * (size + JSON_BYTES)}:
        raise RuntimeError(f"the readers disagree on the bytes of all samples: {read_bytes}")
    seconds = median_seconds(sides)
    rival = Rival("webdataset", samples / seconds.pop("webdataset"))
    goals = {"sequential": 7.0, "random": 6.0, "headers": 5.0}
    return [
        Row(f"{name}_{side}", samples / time, "samples/s", "higher", goal=goals[side], rival=rival)
        for side, time in seconds.items()
    ]


def write(pattern: Path, samples: int, size: int) -> str:
    image, label = random.Random(0).randbytes(size), b"{}".ljust(JSON_BYTES)
    with IndexedShardWriter(str(pattern), samples_per_shard=samples) as writer:
        for number in range(samples):
            writer.write({"__key__": f"{number:08d}", "jpg": image, "json": label})
    path = str(pattern) % 0
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # the kernel would write it out while it is read
    return path


def read(source: ShardSource, order: list[int]) -> int:
    return sum(len(data) for sample in order for data in source.read(0, sample)[1].values())


def walk_headers(path: str) -> None:
    with open_shard(path) as file:
        walk(path, file)


def iterate(path: str) -> int:
    """The same by webdataset, whose own entries of a sample have names that begin with `__`."""
    dataset = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    return sum(len(data) for sample in dataset for name, data in sample.items() if not name.startswith("__"))
