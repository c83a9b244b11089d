"""A file of torch.save, written piece by piece, for code that reads no safetensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch

from megablip.checkpoint.restricted import TorchFile
from megablip.checkpoint.writer import Place, ShardWriter

TORCH_FILE = "model.pt"


class TorchFileWriter(ShardWriter):
    """As ShardWriter, but one file: `{"model_state_dict": {name: tensor}}`.

    torch lays the file out and leaves the tensors' bytes as holes (`skip_data`);
    they are filled later. The archive's checksums, which torch doesn't read, stay those of the holes.
    """

    def _open_files(
        self,
        shards: list[list[str]],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        sizes: Mapping[str, int],
    ) -> None:
        path = self._folder / TORCH_FILE
        # Memory that is never touched takes none.
        tensors = {name: torch.empty(shapes[name], dtype=dtypes[name]) for name in self.order}
        with torch.serialization.skip_data():
            torch.save({"model_state_dict": tensors}, path)
        self._files.append(os.open(path, os.O_RDWR))
        for name, tensor in TorchFile(path).content["model_state_dict"].items():
            self._places[name] = Place(0, tensor.offset, math.prod(shapes[name]), dtypes[name], [])
