"""Flat slices of tensors in safetensors files, read at any world size.

A rank's file holds, for each parameter, the elements [start, end) it owns:
fp32 master and moments, keyed `NAME|KIND`, with shape and offsets in the
header.  The offsets are stored, never derived from a world size, so a reader
takes what it needs from whichever files have it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megablip.errors import CheckpointError
from megablip.records import MASTER, LocalSlice

_HEADER_KEY = "megablip.slices"
_RNG = "rng"


def write_slices(path: Path, slices: Iterable[LocalSlice], rng: dict[str, torch.Tensor]) -> None:
    """One rank's file: its slices, and the states of its random number generators.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    tensors = {f"{_RNG}|{device}": state for device, state in rng.items()}
    extents = {}
    for piece in slices:
        extents[piece.name] = {"shape": piece.shape, "start": piece.start, "end": piece.end}
        for kind, values in piece.tensors.items():
            tensors[f"{piece.name}|{kind}"] = values
    try:
        save_file(tensors, path, metadata={_HEADER_KEY: json.dumps(extents)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


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
        self._folder = folder
        self._open: dict[Path, safe_open] = {}
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

    def read(self, name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """fp32 vector of the elements [start, end) of `NAME|KIND`, flattened."""
        parameter = self.parameters.get(name)
        if parameter is None or parameter.shape != tuple(shape):
            found = "is not in the checkpoint" if parameter is None else f"has shape {parameter.shape} there"
            raise CheckpointError(
                f"the model's {name} {tuple(shape)} {found}",
                where=str(self._folder),
                remedy="the checkpoint belongs to another model",
            )
        values, filled = torch.empty(end - start), start
        for piece_start, piece_end, path in parameter.pieces:
            low, high = max(filled, piece_start), min(end, piece_end)
            if low == filled and low < high:
                stored = self._stored(path, f"{name}|{kind}")
                values[low - start : high - start] = stored[low - piece_start : high - piece_start]
                filled = high
        if filled != end:
            raise CheckpointError(
                f"elements {filled} to {end} of {name} are in no file",
                where=str(self._folder),
                remedy="a rank's file is missing",
            )
        return values

    def whole(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """The whole tensor, fp32, in its shape."""
        shape = self.parameters[name].shape
        return self.read(name, kind, shape, 0, math.prod(shape)).view(shape)

    def rng_states(self, rank: int) -> dict[str, torch.Tensor]:
        """Random states that this rank saved, by device type; empty if there was no such rank."""
        path = self._folder / rank_file(rank)
        if not path.exists():
            return {}
        file = self._file(path)
        return {
            name.partition("|")[2]: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (it is no dict)
            if name.startswith(f"{_RNG}|")
        }

    def _header(self, path: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape, start and end of each parameter's slice in one file."""
        text = (self._file(path).metadata() or {}).get(_HEADER_KEY, "null")
        try:
            return {
                name: (tuple(extent["shape"]), extent["start"], extent["end"])
                for name, extent in json.loads(text).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                "the file has no table of slices", where=str(path), remedy="it is not a rank's file"
            ) from None

    def _stored(self, path: Path, key: str) -> Any:
        try:
            return self._file(path).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{key} can't be read: {error}", where=str(path)) from None

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"the file can't be read: {error}", where=str(path)) from None
        return self._open[path]


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
