"""What conversions read, made of what files hold: a stretch at a time, nothing whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.writer import CHUNK, ShardWriter


def stretches(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts that a tensor is read in; bounds the memory of whatever is computed."""
    numel = math.prod(shape)
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def copy(source: TensorSource, writer: ShardWriter) -> None:
    """All tensors that the writer expects, in its order."""
    shapes = source.shapes
    for name in writer.order:
        for start, end in stretches(shapes[name]):
            writer.write(name, start, source.elements(name, start, end))


class Joined:
    """Tensors from several sources, under names of its own.

    Args:
        parts: name -> the source that has it, and its name there.
    """

    def __init__(self, where: Path, parts: Mapping[str, tuple[TensorSource, str]]):
        self.where, self._parts = where, dict(parts)
        tables = {id(source): (source.shapes, source.dtypes) for source, _ in parts.values()}
        self.shapes = {name: tables[id(source)][0][inner] for name, (source, inner) in parts.items()}
        self.dtypes = {name: tables[id(source)][1][inner] for name, (source, inner) in parts.items()}

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        source, inner = self._parts[name]
        return source.elements(inner, start, end)


class InMemory:
    """Tensors that are there already."""

    def __init__(self, where: Path, tensors: Mapping[str, torch.Tensor]):
        self.where, self._tensors = where, dict(tensors)
        self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        self.dtypes = {name: value.dtype for name, value in tensors.items()}

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        return self._tensors[name].detach().reshape(-1)[start:end]
