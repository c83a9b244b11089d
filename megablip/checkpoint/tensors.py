"""Safetensors files, read strictly and in place.

    8 bytes    little-endian length of the header
    header     JSON: name -> dtype, shape, data_offsets [begin, end) in the data; __metadata__: strings
    data       the tensors, without holes

(github.com/huggingface/safetensors, "Format"). Files of others are not trusted:
the library lets a name that is listed twice pass, for one. Tensors are views of
the mapped file, so that reading needs no memory of its own.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from megablip.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those that a model or a trainer's state may have, as safetensors spells them."""

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class TensorSource(Protocol):
    """Named tensors that can be read a stretch at a time: what conversions read.

    Attributes:
        where: a folder or a file, for messages.
        shapes, dtypes: of each tensor, by name.
    """

    where: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """The elements [start, end) of a flattened tensor, in its own dtype; not to be written to."""


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class TensorFile:
    """One safetensors file.

    Attributes:
        metadata: strings that the header carries beside the tensors.

    Raises:
        CheckpointError: the file can't be opened, or breaks a rule of the format; says which.
    """

    def __init__(self, path: Path):
        self.where = path
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(0)
                length = int.from_bytes(stream.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    self._refuse(f"it has {size} bytes, and its header would have {length}")
                text = stream.read(length)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            self._refuse(str(error))
        self.metadata, self._entries = self._parse(text, 8 + length, size)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """The elements [start, end) of a flattened tensor, as a view of the file.

        Raises:
            CheckpointError: there is no such tensor, or it is shorter.
        """
        entry = self._entries.get(name)
        if entry is None or not 0 <= start <= end <= math.prod(entry.shape):
            found = (
                "no such tensor" if entry is None else f"{math.prod(entry.shape)} elements of it, not {start} to {end}"
            )
            raise CheckpointError(f"{name} can't be read: the file has {found}", where=str(self.where))
        if start == end:
            return torch.empty(0, dtype=entry.dtype)
        offset = entry.begin + start * entry.dtype.itemsize
        return torch.frombuffer(self._map, dtype=entry.dtype, count=end - start, offset=offset)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its shape, as a view of the file."""
        shape = self.shapes.get(name, ())
        return self.elements(name, 0, math.prod(shape)).view(shape)

    def _parse(self, text: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, _Entry]]:
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            self._refuse(f"its header is no JSON: {error or 'nested too deep'}")
        if not isinstance(header, dict):
            self._refuse("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("its metadata are not strings")
        entries = {name: self._entry(name, given, begin) for name, given in header.items()}
        reached = begin
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != reached:
                self._refuse(f"{name} does not begin where the tensor before it ends")
            reached = entry.end
        if reached != size:
            self._refuse(f"its tensors end at byte {reached}, the file at {size}")
        return metadata, entries

    def _entry(self, name: str, given: Any, begin: int) -> _Entry:
        if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
            self._refuse(f"{name} has not just dtype, shape and data_offsets")
        dtype = DTYPES.get(given["dtype"]) if isinstance(given["dtype"], str) else None
        if dtype is None:
            self._refuse(f"{name} has the dtype {given['dtype']!r:.40}, not one of {', '.join(DTYPES)}")
        shape, ends = given["shape"], given["data_offsets"]
        if not _counts(shape) or not _counts(ends) or len(ends) != 2:
            self._refuse(f"{name} has a shape or offsets that are not whole numbers")
        if ends[1] - ends[0] != math.prod(shape) * dtype.itemsize:
            self._refuse(f"{name} has {ends[1] - ends[0]} bytes, its shape {shape!s:.60} needs another number")
        return _Entry(dtype, tuple(shape), begin + ends[0], begin + ends[1])

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"the file can't be read: {reason}", where=str(self.where), remedy="copy it again, or convert anew"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is listed twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on, none of them absurd."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**60 for number in value)
