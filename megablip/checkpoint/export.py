"""A Hugging Face export, read slice by slice, as the start of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megablip.checkpoint.tensors import TensorFile
from megablip.engine.build import build_unfilled
from megablip.engine.topology import Topology
from megablip.errors import CheckpointError
from megablip.model.blip3 import Blip3Config
from megablip.model.lora import base_name, initial_adapter
from megablip.model.samplers import build_sampler, foreign_weights
from megablip.model.vision import build_tower, freeze
from megablip.records import MASTER

if TYPE_CHECKING:  # takes DeepSpeed with it
    from megablip.engine.zero import ReadSlice

VISION_TOWER, SAMPLER = "vision_tower", "sampler"
"""Prefixes in an export."""

_SINGLE, _INDEX, _TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"


class ExportReader:
    """Reads the safetensors files of an export folder, sharded or not.

    Raises:
        CheckpointError: no weights in the folder, a broken file, a tensor that
            is missing or of another shape.
    """

    def __init__(self, folder: Path | str):
        self.folder = self.where = Path(folder)
        self._open: dict[str, TensorFile] = {}
        self._file_of: dict[str, str]
        index = self.folder / _INDEX
        if index.exists():
            self._file_of = _read_index(index)
        elif (self.folder / _SINGLE).exists():
            self._file_of = dict.fromkeys(self._file(_SINGLE).shapes, _SINGLE)
        else:
            raise CheckpointError(
                "the folder holds no model weights",
                where=str(self.folder),
                remedy=f"an export has {_SINGLE} or {_INDEX}; make one with `megablip convert`",
            )

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.names}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._file_with(name).dtypes[name] for name in self.names}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_with(name).shapes[name]

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """The elements [start, end) of a weight, flattened, in its own dtype; not to be written to."""
        return self._file_with(name).elements(name, start, end)

    def read(self, name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """fp32 vector of the elements [start, end) of a weight, flattened; not to be written to.

        `kind` is there to fit the engine's reader; an export has weights only.
        """
        if self.shape(name) != tuple(shape):
            raise CheckpointError(
                f"{name} is {self.shape(name)} in the export and {tuple(shape)} in the model",
                where=str(self.folder),
                remedy="config.json and the weights must belong together",
            )
        return self.elements(name, start, end).float()

    def hash(self) -> str:
        """SHA-256 over names and bytes of the weight files."""
        return self._hash({name: file_hash(self.folder / name) for name in self._weight_files})

    def hashes(self, topology: Topology | None = None) -> dict[str, str]:
        """`hash` as "model", and that of the tokenizer as "tokenizer".

        Args:
            topology: of ranks that share the work (a collective); None: this process does it alone.
        """
        files = [*self._weight_files, _TOKENIZER]
        mine = files[topology.rank :: topology.world] if topology else files
        own = {name: file_hash(self.folder / name) for name in mine}
        found: dict[str, str] = {}
        for part in topology.gather(own) if topology else [own]:
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

    def _file_with(self, name: str) -> TensorFile:
        if name not in self._file_of:
            apart = any(".lora_" in other for other in self._file_of)
            raise CheckpointError(
                f"the export has no weight {name}" + (", but adapters that are not merged" if apart else ""),
                where=str(self.folder),
                remedy="merge the adapters into the weights, with peft's merge_and_unload" if apart else "",
            )
        file = self._file(self._file_of[name])
        if name not in file.shapes:
            raise CheckpointError(f"the file has no weight {name}, which the index promises", where=str(file.where))
        return file

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]


def base_of(export: ExportReader, config: Blip3Config, topology: Topology | None = None) -> dict[str, str]:
    """What a run begins with, as its checkpoints keep it: hashes of "model" and "tokenizer", and the "sampler".

    The sampler is its kind and sizes, as text that is the same where they are: no hash covers config.json.

    Args:
        topology: as of `ExportReader.hashes`.
    """
    return export.hashes(topology) | {"sampler": json.dumps(config.sampler, sort_keys=True)}


def check_sampler(export: ExportReader, config: Blip3Config) -> None:
    """Raises CheckpointError where the weights are those of another sampler than the config names."""
    with torch.device("meta"), no_init_weights():
        wanted = {name for name, _ in build_sampler(config).named_parameters()}
    prefix = f"{SAMPLER}."
    found = {name.removeprefix(prefix) for name in export.names if name.startswith(prefix)}
    if found != wanted:
        raise foreign_weights(found, wanted, config, str(export.folder))


def first_weights(export: ExportReader, seed: int) -> ReadSlice:
    """What a run begins with, slice by slice: the export's weights, and fresh adapters where the model has them."""

    def read(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        adapter = initial_adapter(name, shape, seed)
        if adapter is not None:
            return adapter.flatten()[start:end]
        return export.read(base_name(name), kind, shape, start, end)

    return read


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        if any(Path(file).name != file for file in file_of.values()):
            raise ValueError("a weight is said to lie outside the folder")
        return file_of
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
