"""What conversions read, made of what files hold: a stretch at a time, nothing whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.restricted import TensorRef, TorchFile
from megablip.checkpoint.tensors import TensorFile, TensorSource
from megablip.checkpoint.writer import CHUNK, ShardWriter
from megablip.errors import CheckpointError


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


@dataclass(frozen=True)
class Span:
    """Elements [start, end) of a tensor are those of another, from `offset` on."""

    start: int
    end: int
    source: TensorSource
    name: str
    offset: int = 0


class Spliced:
    """Tensors put together of stretches of others; zeros where there is none.

    Args:
        spans: of each tensor, by rising start, without overlap.
    """

    def __init__(
        self,
        where: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        spans: Mapping[str, Sequence[Span]],
    ):
        self.where, self.shapes, self.dtypes, self._spans = where, dict(shapes), dict(dtypes), spans

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        found, at = [], start
        for span in self._spans[name]:
            low, high = max(at, span.start), min(end, span.end)
            if low < high:
                if low > at:
                    found.append(torch.zeros(low - at, dtype=self.dtypes[name]))
                offset = span.offset - span.start
                found.append(span.source.elements(span.name, low + offset, high + offset))
                at = high
        if at < end:
            found.append(torch.zeros(end - at, dtype=self.dtypes[name]))
        return found[0] if len(found) == 1 else torch.cat(found)


def tensors_in(path: Path) -> TensorSource:
    """The tensors of a folder of safetensors, of one such file, or of a file of torch.save.

    Raises:
        CheckpointError: it is nothing of the kind, or damaged.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in TORCH_FILES]
        if len(files) == 1 and not list(path.glob("*.safetensors*")):
            return StateDict(files[0])
        return ExportReader(path)
    return StateDict(path) if path.suffix in TORCH_FILES else TensorFile(path)


class StateDict:
    """The tensors of a file of torch.save: a state dict, bare or in `model_state_dict`. Runs nothing of it.

    Raises:
        CheckpointError: the file is damaged, asks for a class that is not listed, or is no state dict.
    """

    def __init__(self, path: Path):
        self.where = path
        content = TorchFile(path).content
        for key in ("model_state_dict", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not content or not all(map(_is_weight, content.items())):
            raise CheckpointError(
                "the file holds no state dict",
                where=str(path),
                remedy="give one of a model, bare or in `model_state_dict`",
            )
        self._tensors: dict[str, TensorRef] = content
        self.shapes = {name: tensor.shape for name, tensor in content.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in content.items()}

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        return self._tensors[name].flat(start, end)


TORCH_FILES = (".pt", ".pth", ".bin")


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], TensorRef)


def under_prefix(source: TensorSource, names: Iterable[str], target: str = "") -> dict[str, tuple[TensorSource, str]]:
    """Where a source has these names behind a prefix of its own, such as `vision_model.`; by `target` + name.

    Raises:
        CheckpointError: the source lacks one of them.
    """
    names, stored = list(names), source.shapes
    prefixes = {found.removesuffix(names[0]) for found in stored if f".{found}".endswith(f".{names[0]}")}
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in stored for name in names):
            return {target + name: (source, prefix + name) for name in names}
    prefix = min(prefixes, key=len, default="")
    missing = next(name for name in names if prefix + name not in stored)
    raise CheckpointError(
        f"there is no tensor {prefix}{missing}", where=str(source.where), remedy="it belongs to another model"
    )
