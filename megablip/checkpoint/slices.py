"""Flat slices of tensors in safetensors files, read at any world size.

A rank's file holds, for each parameter, the elements [start, end) it owns:
fp32 master and moments, keyed `NAME|KIND`, with shape and offsets in the
header.  The offsets are stored, never derived from a world size, so a reader
takes what it needs from whichever files have it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megablip.checkpoint.tensors import TensorFile
from megablip.errors import CheckpointError
from megablip.records import MASTER, MOMENTS, LocalSlice

_HEADER_KEY = "megablip.slices"
_RNG = "rng"
_STRETCH = 1 << 20  # elements that are hashed and written at once
_ITEM_BYTES = {"F32": 4, "U8": 1}

FileRecord = dict[str, Any]
"""Of a file: its "size", its "sha256"; of a rank's, "weights" too: "bytes" and "sha256" of header and masters."""


def write_slices(
    path: Path,
    slices: Iterable[LocalSlice],
    rng: Mapping[str, torch.Tensor] | None = None,
    advance: Callable[[int], None] = lambda size: None,
) -> FileRecord:
    """Write one rank's file, a stretch at a time, and sync it to disk.

    All masters come first, then the moments: who wants the weights alone reads, and
    verifies, the beginning of the file.

    Args:
        slices: their tensors, contiguous and of any floating dtype, may be views of mapped files.
        rng: states of the rank's random number generators, uint8 vectors by device type.
        advance: told of each stretch's bytes.

    Returns:
        What the manifest keeps of the file.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    slices = list(slices)
    extents = {piece.name: {"shape": piece.shape, "start": piece.start, "end": piece.end} for piece in slices}
    header: dict[str, Any] = {"__metadata__": {_HEADER_KEY: json.dumps(extents)}}
    masters, rest = [], []
    for kind in (MASTER, *MOMENTS):
        for piece in slices:
            if kind in piece.tensors:
                place = masters if kind == MASTER else rest
                place.append((f"{piece.name}|{kind}", "F32", piece.tensors[kind]))
    rest += [(f"{_RNG}|{device}", "U8", state) for device, state in (rng or {}).items()]
    end = 0
    for name, dtype, values in masters + rest:
        begin, end = end, end + _ITEM_BYTES[dtype] * values.numel()
        header[name] = {"dtype": dtype, "shape": [values.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:

        def write(data: bytes | memoryview) -> int:
            digest.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            advance(len(data))
            return len(data)

        size = write(struct.pack("<Q", len(text)) + text)
        size += sum(map(write, _stretches(masters)))
        weights = {"bytes": size, "sha256": digest.hexdigest()}
        size += sum(map(write, _stretches(rest)))
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest(), "weights": weights}


def _stretches(tensors: list[tuple[str, str, torch.Tensor]]) -> Iterator[memoryview]:
    for _, dtype, values in tensors:
        for start in range(0, values.numel(), _STRETCH):
            stretch = values[start : start + _STRETCH]
            yield memoryview((stretch.float() if dtype == "F32" else stretch).view(torch.uint8).numpy())


@dataclass
class _Parameter:
    shape: tuple[int, ...]
    pieces: list[tuple[int, int, Path]] = field(default_factory=list)  # start, end, file


class SliceReader:
    """Reads parameters out of the rank files of one checkpoint.

    Raises:
        CheckpointError: a file that is no safetensors file, files that
            disagree on a shape, or elements that no file has.
    """

    def __init__(self, folder: Path):
        self.where = folder
        self._open: dict[Path, TensorFile] = {}
        self.parameters: dict[str, _Parameter] = {}
        for path in sorted(folder.glob("rank_*.safetensors")):
            for name, (shape, start, end) in self._header(path).items():
                known = self.parameters.setdefault(name, _Parameter(shape))
                if known.shape != shape:
                    raise CheckpointError(
                        f"{name} has shape {shape} here and {known.shape} in another file", where=str(path)
                    )
                if end > start:
                    known.pieces.append((start, end, path))
        for parameter in self.parameters.values():
            parameter.pieces.sort()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(self.parameters, torch.float32)

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """`read` of the master; not to be written to."""
        return self.read(name, MASTER, self.parameters[name].shape, start, end)

    def read(self, name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """fp32 vector of the elements [start, end) of `NAME|KIND`, flattened; not to be written to."""
        parameter = self.parameters.get(name)
        if parameter is None or parameter.shape != tuple(shape):
            found = "is not in the checkpoint" if parameter is None else f"has shape {parameter.shape} there"
            raise CheckpointError(
                f"the model's {name} {tuple(shape)} {found}",
                where=str(self.where),
                remedy="the checkpoint belongs to another model",
            )
        found, filled = [], start
        for piece_start, piece_end, path in parameter.pieces:
            low, high = max(filled, piece_start), min(end, piece_end)
            if low == filled and low < high:
                found.append(self._file(path).elements(f"{name}|{kind}", low - piece_start, high - piece_start))
                filled = high
        if filled != end:
            raise CheckpointError(
                f"elements {filled} to {end} of {name} are in no file",
                where=str(self.where),
                remedy="a rank's file is missing",
            )
        if len(found) == 1:
            return found[0]  # as it lies in the file
        return torch.cat(found) if found else torch.empty(0)

    def whole(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """The whole tensor, fp32, in its shape."""
        shape = self.parameters[name].shape
        return self.read(name, kind, shape, 0, math.prod(shape)).view(shape)

    def rng_states(self, rank: int) -> dict[str, torch.Tensor]:
        """Random states that this rank saved, by device type; empty if there was no such rank."""
        path = self.where / rank_file(rank)
        if not path.exists():
            return {}
        file = self._file(path)
        return {
            name.partition("|")[2]: file.tensor(name).clone() for name in file.shapes if name.startswith(f"{_RNG}|")
        }

    def _header(self, path: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape, start and end of each parameter's slice in one file."""
        text = self._file(path).metadata.get(_HEADER_KEY, "null")
        try:
            return {
                name: (tuple(extent["shape"]), extent["start"], extent["end"])
                for name, extent in json.loads(text).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                "the file has no table of slices", where=str(path), remedy="it is not a rank's file"
            ) from None

    def _file(self, path: Path) -> TensorFile:
        if path not in self._open:
            self._open[path] = TensorFile(path)
        return self._open[path]


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
