"""A Hugging Face export, read slice by slice, as the start of a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from megablip.engine.build import build_unfilled
from megablip.engine.topology import Topology
from megablip.errors import CheckpointError
from megablip.model.lora import base_name, initial_adapter
from megablip.model.vision import build_tower, freeze
from megablip.records import MASTER

VISION_TOWER = "vision_tower"
"""The tower's prefix in an export."""

_SINGLE, _INDEX, _TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"


class ExportReader:
    """Reads the safetensors files of an export folder, sharded or not.

    Raises:
        CheckpointError: no weights in the folder, a broken file, a tensor that
            is missing or of another shape.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._open: dict[str, safe_open] = {}
        self._file_of: dict[str, str]
        index = self.folder / _INDEX
        if index.exists():
            self._file_of = _read_index(index)
        elif (self.folder / _SINGLE).exists():
            self._file_of = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        else:
            raise CheckpointError(
                "the folder holds no model weights",
                where=str(self.folder),
                remedy=f"an export has {_SINGLE} or {_INDEX}; make one with `megablip convert`",
            )

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored(name).get_shape())

    def read(self, name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """fp32 vector of the elements [start, end) of a weight, flattened.

        `kind` is there to fit the engine's reader; an export has weights only.
        """
        stored = self._stored(name)
        if tuple(stored.get_shape()) != tuple(shape):
            raise CheckpointError(
                f"{name} is {tuple(stored.get_shape())} in the export and {tuple(shape)} in the model",
                where=str(self.folder),
                remedy="config.json and the weights must belong together",
            )
        # Only the rows that the slice touches are read.
        row = math.prod(shape[1:])
        first, last = start // row, -(-end // row)
        return stored[first:last].reshape(-1)[start - first * row : end - first * row].float()

    def hash(self) -> str:
        """SHA-256 over names and bytes of the weight files."""
        return self._hash({name: file_hash(self.folder / name) for name in self._weight_files})

    def hashes(self, topology: Topology) -> dict[str, str]:
        """`hash` as "model", and that of the tokenizer as "tokenizer"; ranks share the work (a collective)."""
        mine = [*self._weight_files, _TOKENIZER][topology.rank :: topology.world]
        found: dict[str, str] = {}
        for part in topology.gather({name: file_hash(self.folder / name) for name in mine}):
            found |= part
        return {"model": self._hash(found), "tokenizer": found[_TOKENIZER]}

    @property
    def _weight_files(self) -> list[str]:
        return sorted(set(self._file_of.values()))

    def _hash(self, hashes: dict[str, str]) -> str:
        digest = hashlib.sha256()
        for name in self._weight_files:
            digest.update(name.encode())
            digest.update(hashes[name].encode())
        return digest.hexdigest()

    def _stored(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"the export has no weight {name}", where=str(self.folder))
        file = self._file(self._file_of[name])
        try:
            return file.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{name} can't be read: {error}", where=str(self.folder / self._file_of[name])
            ) from None

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"the file can't be read: {error}", where=str(self.folder / name)) from None
        return self._open[name]


def first_weights(export: ExportReader, seed: int) -> Callable[[str, str, tuple[int, ...], int, int], torch.Tensor]:
    """What a run begins with, slice by slice: the export's weights, and fresh adapters where the model has them."""

    def read(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        adapter = initial_adapter(name, shape, seed)
        if adapter is not None:
            return adapter.flatten()[start:end]
        return export.read(base_name(name), kind, shape, start, end)

    return read


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the index can't be read: {type(error).__name__}: {error}",
            where=str(path),
            remedy="copy or convert the folder again",
        ) from None


def load_tower(
    export: ExportReader, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The export's vision tower, frozen, in `dtype` on `device`.

    Raises:
        CheckpointError: the export lacks a weight of the tower.
    """
    tower = build_unfilled(lambda: build_tower(config, pooling_head=False), dtype, device)
    for name, parameter in tower.named_parameters():
        shape = tuple(parameter.shape)
        values = export.read(f"{VISION_TOWER}.{name}", MASTER, shape, 0, parameter.numel())
        parameter.data.copy_(values.view(shape))
    return freeze(tower.to(device))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: the file can't be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"the file can't be read: {error.strerror}", where=str(path)) from None
