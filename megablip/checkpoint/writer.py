"""Folders of safetensors files, written piece by piece at their final offsets.

    with new_folder(output) as staging:
        (staging / "config.json").write_text(...)
        with ShardWriter(staging, shapes, torch.bfloat16) as writer:
            for name, start, values in pieces:       # in any order
                writer.write(name, start, values)

The headers are written first, since names, shapes and dtypes are all they need;
then every element has its place in a file, and no tensor is ever assembled. A
thread syncs what is written to disk meanwhile. The folder gets its name when
all is complete and durable: a conversion that is killed leaves no output.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megablip.checkpoint.tensors import DTYPES
from megablip.errors import CheckpointError, ConfigError

SHARD_BYTES = 5 * 10**9  # what transformers writes by default
CHUNK = 1 << 20  # elements that are cast at once; bounds the memory

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights are written in."""

_SYNC_BYTES = 256 * 2**20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Place:
    """Where a tensor lies, and which of its elements have been written."""

    file: int  # index into the open files
    offset: int  # bytes
    numel: int
    dtype: torch.dtype
    written: list[tuple[int, int]]

    def add(self, start: int, end: int) -> None:
        if self.written and self.written[-1][1] == start:
            self.written[-1] = (self.written[-1][0], end)
        elif end > start:
            self.written.append((start, end))

    def problem(self) -> str | None:
        reached = 0
        for start, end in sorted(self.written):
            if start < reached:
                return f"elements {start} to {min(reached, end)} were written twice"
            if start > reached:
                return f"elements {reached} to {start} were never written"
            reached = end
        return None if reached == self.numel else f"elements {reached} to {self.numel} were never written"


def precision(name: str) -> torch.dtype:
    """Raises ConfigError for what is not fp32, bf16 or fp16."""
    if name not in PRECISIONS:
        raise ConfigError(f"unknown dtype '{name}'", where="--dtype", remedy=f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


class ShardWriter:
    """Writes `model.safetensors`, or files of at most `shard_bytes` and their index.

    Args:
        folder: exists; a folder of `new_folder`, which syncs it as a whole.
        shapes: of all tensors, by name.
        dtype: of all tensors, or of each by name; pieces of another one are cast as torch casts.
        title: of the progress bar.

    Raises:
        CheckpointError: there is no room for the files; a piece lies outside its tensor,
            or has finite values that fp16 can't hold; on leaving, an element was
            written twice or not at all.
        OSError: a file can't be written.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | Mapping[str, torch.dtype],
        *,
        shard_bytes: int | None = None,
        title: str = "converting",
    ):
        dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
        # The largest dtype first within a file keeps every tensor aligned.
        sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        shards = [
            sorted(shard, key=lambda name: (-dtypes[name].itemsize, name))
            for shard in _plan(sizes, shard_bytes or SHARD_BYTES)
        ]
        self._folder = folder
        self.total_bytes = sum(sizes.values())
        free = shutil.disk_usage(folder).free
        if self.total_bytes > free:
            raise CheckpointError(
                f"the weights need {self.total_bytes:,} bytes and {free:,} are free",
                where=str(folder),
                remedy="free space or choose another folder",
            )
        self.order = [name for shard in shards for name in shard]
        """The tensors as they lie in the files; the fastest order to write them in."""
        self._places: dict[str, Place] = {}
        self._files: list[int] = []
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._syncs = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._sync: Future | None = None
        self._unsynced_bytes = 0
        self._progress = progress_bar()
        self._task = self._progress.add_task(title, total=self.total_bytes)
        self._open_files(shards, shapes, dtypes, sizes)

    def __enter__(self) -> ShardWriter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._check_complete()
                if self._sync:
                    self._sync.result()
                for file in self._files:
                    os.fsync(file)
        finally:
            self._syncs.shutdown()
            self._progress.stop()
            for file in self._files:
                os.close(file)

    def write(self, name: str, start: int, values: torch.Tensor | np.ndarray) -> None:
        """Put the elements [start, start + len(values)) of a flattened tensor in their place.

        Args:
            values: a contiguous vector of any floating dtype, or of the tensor's own.
        """
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"there is no tensor {name} among those to be written", where=str(self._folder))
        values = torch.as_tensor(values)
        end = start + values.numel()
        if start < 0 or end > place.numel:
            raise CheckpointError(
                f"elements {start} to {end} were given for {name}, which has {place.numel}", where=str(self._folder)
            )
        place.add(start, end)
        for first in range(0, values.numel(), CHUNK):
            chunk = values[first : first + CHUNK]
            data = self._cast(chunk, place.dtype, name).view(torch.uint8).numpy()
            _write_at(self._files[place.file], data, place.offset + (start + first) * place.dtype.itemsize)
            self._progress.advance(self._task, len(data))
            self._unsynced_bytes += len(data)
            if self._unsynced_bytes >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
                self._start_sync(self._files[place.file])

    def _cast(self, chunk: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        if chunk.dtype == dtype:
            return chunk
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(CHUNK, dtype=dtype)
        cast = self._buffers[dtype][: chunk.numel()].copy_(chunk)
        if dtype == torch.float16 and not torch.equal(cast.isinf(), chunk.isinf()):
            raise CheckpointError(
                f"{name} has values that fp16 can't hold, up to {chunk[chunk.isfinite()].abs().max():.3g}",
                where=str(self._folder),
                remedy="write bf16 or fp32",
            )
        return cast

    def _start_sync(self, file: int) -> None:
        """The disk works while pieces are still read and cast."""
        if self._sync:
            self._sync.result()
        self._unsynced_bytes = 0
        self._sync = self._syncs.submit(os.fdatasync, file)

    def _open_files(
        self,
        shards: list[list[str]],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        sizes: Mapping[str, int],
    ) -> None:
        """Make the files with their headers, and say where each tensor lies in them."""
        weight_map = {}
        for number, names in enumerate(shards):
            file = _file_name(number, len(shards))
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                ends = [offset, offset := offset + sizes[name]]
                header[name] = {
                    "dtype": _DTYPE_NAMES[dtypes[name]],
                    "shape": list(shapes[name]),
                    "data_offsets": ends,
                }
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._files.append(os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            _write_at(self._files[-1], np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8), 0)
            os.ftruncate(self._files[-1], 8 + len(text) + offset)
            for name in names:
                start = 8 + len(text) + header[name]["data_offsets"][0]
                self._places[name] = Place(number, start, math.prod(shapes[name]), dtypes[name], [])
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _check_complete(self) -> None:
        for name, place in self._places.items():
            problem = place.problem()
            if problem:
                raise CheckpointError(f"{name}: {problem}", where=str(self._folder))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is whole and on disk.

    Raises:
        ConfigError: `output` is there already.
        CheckpointError: it can't be written.
    """
    if output.exists():
        raise ConfigError("the output exists already", where=str(output), remedy="remove it or choose another folder")
    staging = output.with_name(output.name + ".tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _sync_path(path)
        os.rename(staging, output)
        _sync_path(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"the folder can't be written: {error}", where=str(output), remedy="free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _plan(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names, in order of their own, cut into files of at most `shard_bytes`, or of one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    return shards


def _file_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def _write_at(file: int, data: np.ndarray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def progress_bar() -> Progress:
    """Bytes, speed and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
