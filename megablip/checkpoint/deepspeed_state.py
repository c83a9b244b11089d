"""What a DeepSpeed checkpoint holds, in whichever of its formats, and the part that all have: model states.

    mp_rank_00_model_states.pt                    ZeRO-1, 2: shapes, buffers, frozen parameters, step
    zero_pp_rank_R_mp_rank_00_model_states.pt     ZeRO-3: the same, frozen parameters cut up

Source: deepspeed/runtime/engine.py (_save_checkpoint, _get_zero_param_shapes,
_get_zero_frozen_param_attributes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megablip.checkpoint.restricted import TensorRef, TorchFile
from megablip.errors import CheckpointError
from megablip.records import MASTER

DAMAGED = "copy the file again, or use another checkpoint"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fragment:
    """The flat elements [start, end) of a parameter, where they lie.

    `places` gives for "fp32", "exp_avg" and "exp_avg_sq" a stored vector and the
    position of the first element in it.
    """

    name: str
    start: int
    end: int
    places: dict[str, tuple[TensorRef, int]]

    def values(self, kind: str) -> torch.Tensor:
        """The elements, mapped from their file."""
        stored, first = self.places[kind]
        return stored.flat(first, first + self.end - self.start)


@dataclass(frozen=True)
class TrainingState:
    """What a DeepSpeed checkpoint holds of a run, in whichever of its formats.

    Attributes:
        title: the kind of checkpoint, for messages.
        step: optimizer steps of the run, skipped ones included.
        adam_step: updates that Adam has made.
        shapes: of the trained parameters, by name.
        ranks: the fragments that each rank saved; together each element once.
        frozen: shape and fragments ("fp32", whatever their dtype) of parameters that are not trained.
        buffers: by name.
        shared: names of tied parameters -> the name under which they are stored.
        groups: the optimizer's settings (lr, weight_decay, betas, ...) for each parameter group.
        group_of: number of each trained parameter's group; empty where the checkpoint doesn't tell.
    """

    folder: Path
    title: str
    step: int
    adam_step: int
    shapes: dict[str, Shape]
    ranks: list[list[Fragment]]
    frozen: dict[str, tuple[Shape, list[Fragment]]]
    buffers: dict[str, TensorRef]
    shared: dict[str, str]
    groups: list[dict[str, Any]]
    group_of: dict[str, int]

    def fragments(self) -> Iterator[Fragment]:
        for rank in self.ranks:
            yield from rank

    def without_prefix(self, prefix: str) -> TrainingState:
        """The same, with names that lack a prefix."""

        def short(named: dict[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in named.items()}

        def renamed(fragments: list[Fragment]) -> list[Fragment]:
            return [replace(fragment, name=fragment.name.removeprefix(prefix)) for fragment in fragments]

        return replace(
            self,
            shapes=short(self.shapes),
            ranks=[renamed(rank) for rank in self.ranks],
            frozen={name: (shape, renamed(parts)) for name, (shape, parts) in short(self.frozen).items()},
            buffers=short(self.buffers),
            shared={alias: name.removeprefix(prefix) for alias, name in short(self.shared).items()},
            group_of=short(self.group_of),
        )


class ModelStates:
    """The model states of one checkpoint.

    Args:
        paths: the files, in order of ranks; more than one only under ZeRO-3.
        partitioned: frozen parameters are cut into parts, one a file.

    Attributes:
        groups: shapes of the trained parameters, for each parameter group or sub-group, in the order of its vectors.
        step, version, ds_config: as DeepSpeed counted, was called and was set.
        buffers, shared: as in TrainingState.

    Raises:
        CheckpointError: a file can't be read, is none of these, or is of another step.
    """

    def __init__(self, paths: list[Path], *, partitioned: bool):
        self._files, self._partitioned = [TorchFile(path) for path in paths], partitioned
        for file in self._files:
            required(file, file.content, "param_shapes", list)
        content = self._content = self._files[0].content
        self.groups: list[dict[str, Shape]] = []
        for group in content["param_shapes"]:
            if not isinstance(group, dict):
                raise _damaged(self._files[0], "param_shapes is no list of tables")
            self.groups.append({name: self._shape(name, shape) for name, shape in group.items()})
        self.step = self._same_step()
        self.version = str(content.get("ds_version"))[:40]
        self.ds_config: dict[str, Any] = self._table("ds_config")
        self.shared = {str(alias): str(name) for alias, name in self._table("shared_params").items()}
        self._module = self._table("module")
        names = content.get("buffer_names") or []
        self.buffers = {name: self._module[name] for name in names if isinstance(self._module.get(name), TensorRef)}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of all trained parameters."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    def frozen(self) -> dict[str, tuple[Shape, list[Fragment]]]:
        """Parameters that are not trained; ZeRO-1 keeps them in the module's state dict only."""
        found: dict[str, tuple[Shape, list[Fragment]]] = {}
        for name, raw in self._table("frozen_param_shapes").items():
            shape, fragments = self._shape(name, raw), []
            numel = math.prod(shape)
            width = -(-numel // len(self._files)) if self._partitioned else numel
            for rank, file in enumerate(self._files if self._partitioned else self._files[:1]):
                stored = (file.content.get("frozen_param_fragments") or {}).get(name)
                start, end = min(rank * width, numel), min((rank + 1) * width, numel)
                if not isinstance(stored, TensorRef) or stored.numel < end - start:
                    raise _damaged(file, f"{name} is not whole")
                if end > start:
                    fragments.append(Fragment(name, start, end, {MASTER: (stored, 0)}))
            found[name] = (shape, fragments)
        if not self._partitioned:
            others = self.shapes.keys() | self.shared.keys() | self.buffers.keys() | found.keys()
            for name, value in self._module.items():
                if name not in others and isinstance(value, TensorRef):
                    found[name] = (value.shape, [Fragment(name, 0, value.numel, {MASTER: (value, 0)})])
        return found

    def _same_step(self) -> int:
        """The step, which must be one and the same in all files."""
        steps = [file.content.get("global_steps") for file in self._files]
        for file, step in zip(self._files, steps, strict=True):
            if type(step) is not int or step < 0:
                raise _damaged(file, "the file does not tell the step")
            if step != steps[0]:
                raise mixed_steps(file.path, f"{file.path.name} is of step {step}, that of rank 0 of step {steps[0]}")
        return steps[0]

    def _table(self, key: str) -> dict[str, Any]:
        value = self._content.get(key)
        return value if isinstance(value, dict) else {}

    def _shape(self, name: Any, shape: Any) -> Shape:
        if not isinstance(name, str) or not isinstance(shape, tuple):
            raise _damaged(self._files[0], f"the shape of {name} is not told")
        return shape


def settings_of_groups(
    param_groups: list[Any], groups: list[dict[str, Shape]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The optimizer's settings for each parameter group, and each parameter's group.

    Args:
        param_groups: of an optimizer's state dict.
        groups: ModelStates.groups, to whose places `params` of a parameter group refer.
    """
    group_of = {}
    for number, group in enumerate(param_groups):
        for index in group.get("params", []):
            if isinstance(index, int) and 0 <= index < len(groups):
                group_of |= dict.fromkeys(groups[index], number)
    return [{key: value for key, value in group.items() if key != "params"} for group in param_groups], group_of


def scalar(value: Any) -> float:
    """A number, stored as such or as a tensor of one element; NaN for anything else."""
    if isinstance(value, TensorRef) and value.numel == 1:
        return value.flat().item()
    return value if isinstance(value, int | float) else math.nan


def required(file: TorchFile, content: Any, key: str, kind: type) -> Any:
    """An entry of a table in a file.

    Raises:
        CheckpointError: it is not there, or of another kind.
    """
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise CheckpointError(
            f"the file has no {key} as DeepSpeed writes it",
            where=str(file.path),
            remedy="it is no ZeRO checkpoint, or made by a version or a setting (elastic) that is not read",
        )
    return value


def mixed_steps(where: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"files of different steps are mixed: {what}", where=str(where), remedy="use files of one checkpoint"
    )


def _damaged(file: TorchFile, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file.path), remedy=DAMAGED)
