"""The weights of a DeepSpeed checkpoint, as a source of tensors and as a Hugging Face folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megablip.checkpoint.deepspeed_files import read_zero
from megablip.checkpoint.deepspeed_state import Fragment, TrainingState
from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.writer import CHUNK, ShardWriter, new_folder, precision
from megablip.errors import CheckpointError
from megablip.records import MASTER

MODEL_FILES = (".json", ".model", ".jinja")


class DeepSpeedWeights:
    """Masters, frozen parameters and buffers by the names of the model's state dict; a TensorSource."""

    def __init__(self, state: TrainingState):
        self.where = state.folder
        self.shapes: dict[str, tuple[int, ...]] = dict(state.shapes)
        self.buffers = set(state.buffers)
        self.aliases: set[str] = set()
        """Second names of tied parameters."""
        self._fragments: dict[str, list[Fragment]] = {name: [] for name in state.shapes}
        for fragment in state.fragments():
            self._fragments[fragment.name].append(fragment)
        for name, (shape, fragments) in state.frozen.items():
            self.shapes[name], self._fragments[name] = shape, fragments
        for name, buffer in state.buffers.items():
            self.shapes[name] = buffer.shape
            self._fragments[name] = [Fragment(name, 0, buffer.numel, {MASTER: (buffer, 0)})]
        for alias, name in state.shared.items():
            if name in self._fragments:
                self.shapes[alias], self._fragments[alias] = self.shapes[name], self._fragments[name]
                self.aliases.add(alias)
        for fragments in self._fragments.values():
            fragments.sort(key=lambda fragment: fragment.start)
        self.dtypes = {
            name: fragments[0].places[MASTER][0].dtype if fragments else torch.float32
            for name, fragments in self._fragments.items()
        }

    def pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """First element and values of each stored stretch of a tensor, in order."""
        for fragment in self._fragments[name]:
            yield fragment.start, fragment.values(MASTER)

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """The elements [start, end) of a flattened tensor, in its own dtype."""
        found = [
            values[max(start - first, 0) : end - first]
            for first, values in self.pieces(name)
            if first < end and start < first + len(values)
        ]
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=self.dtypes[name]), *found])


def zero_files_to_hf(
    source: Path, output: Path, dtype: str = "fp32", *, like: Path | None = None, strip_prefix: str = ""
) -> None:
    """Write the weights of DeepSpeed's own files as safetensors.

    Args:
        source: the folder with the *_optim_states.pt files, or that with `latest` beside it.
        dtype: fp32, bf16 or fp16, of floating tensors; others keep theirs.
        like: folder of the model in Hugging Face's format: gives names, config, processor
            and tokenizer, and the parameters that the checkpoint lacks because they were
            not trained. None: all tensors by their names in the checkpoint, no config.
        strip_prefix: what the names begin with in the checkpoint, for example "module.".

    Raises:
        CheckpointError: no such checkpoint, damaged or mixed files, or the model of `like` is another one.
        ConfigError: unknown dtype, or `output` exists.
    """
    torch_dtype = precision(dtype)
    weights = DeepSpeedWeights(read_zero(source).without_prefix(strip_prefix))
    base = ExportReader(like) if like else None
    shapes = dict(weights.shapes)
    if base:
        shapes = {name: base.shape(name) for name in base.names}
        _check_fit(weights, base)
    dtypes = dict.fromkeys(shapes, torch_dtype)
    dtypes |= {name: own for name, own in weights.dtypes.items() if name in shapes and not own.is_floating_point}
    with new_folder(output) as staging:
        if like:
            for path in like.iterdir():
                if path.suffix in MODEL_FILES and not path.name.startswith("model."):
                    shutil.copy(path, staging)
        with ShardWriter(staging, shapes, dtypes) as writer:
            for name in writer.order:
                if name in weights.shapes:
                    for start, values in weights.pieces(name):
                        writer.write(name, start, values)
                else:
                    for start in range(0, math.prod(shapes[name]), CHUNK):
                        end = min(start + CHUNK, math.prod(shapes[name]))
                        writer.write(name, start, base.elements(name, start, end))
    taken = [name for name in shapes if name not in weights.shapes]
    print(f"wrote {output}" + (f"; {len(taken)} weights are those of {like}, as {taken[0]}" if taken else ""))


def _check_fit(weights: DeepSpeedWeights, base: ExportReader) -> None:
    names = set(base.names)
    unknown = sorted(weights.shapes.keys() - names - weights.aliases - weights.buffers)
    if unknown:
        raise CheckpointError(
            f"the model has no weight {unknown[0]}, which the checkpoint has, nor {len(unknown) - 1} others",
            where=f"{weights.where}, {base.folder}",
            remedy="give the folder of the same model; --strip-prefix takes away what all names begin with",
        )
    for name in sorted(names & weights.shapes.keys()):
        if tuple(base.shape(name)) != weights.shapes[name]:
            raise CheckpointError(
                f"{name} is {weights.shapes[name]} in the checkpoint and {tuple(base.shape(name))} in the model",
                where=f"{weights.where}, {base.folder}",
                remedy="give the folder of the same model",
            )
