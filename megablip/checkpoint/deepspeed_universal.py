"""DeepSpeed's universal format: whole tensors, a file each, from which a run goes on at any world size.

    FOLDER/latest_universal                  names TAG
    FOLDER/TAG/zero/NAME/fp32.pt             {"param": tensor}, or (from ZeRO-3) the flat tensor alone
    FOLDER/TAG/zero/NAME/exp_avg.pt, exp_avg_sq.pt, step.pt
    FOLDER/TAG/zero/optimizer_state.pt       settings of the parameter groups
    FOLDER/TAG/*model_states.pt              as in the checkpoint that it was made of

Sources: deepspeed/checkpoint/ds_to_universal.py writes it; runtime/base_optimizer.py
(ZeRO-1, 2), runtime/zero/stage3.py and checkpoint/universal_checkpoint.py read it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megablip.checkpoint.deepspeed_state import (
    Fragment,
    ModelStates,
    Shape,
    TrainingState,
    mixed_steps,
    required,
    scalar,
    settings_of_groups,
)
from megablip.checkpoint.restricted import TensorRef, TorchFile
from megablip.errors import CheckpointError
from megablip.records import MASTER, MOMENTS

OPTIMIZER_STATE = Path("zero") / "optimizer_state.pt"
FILE_BYTES = 2 * 10**9
"""Of the fragments that count as those of one rank."""

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
_VERSION = "0.19.8"  # of DeepSpeed, whose files ours are like; DeepSpeed refuses files that name none


def read_universal(folder: Path) -> TrainingState:
    """Read a checkpoint in universal format; its tensors stay on disk.

    Raises:
        CheckpointError: a file is missing or damaged, or what it holds can't be used here.
    """
    models = _model_states(folder)
    optimizer = TorchFile(folder / OPTIMIZER_STATE)
    content = optimizer.content
    if isinstance(content, dict) and "param_groups" not in content:
        content = content.get("optimizer_state_dict")  # as ZeRO-3 has it
    groups, group_of = settings_of_groups(required(optimizer, content, "param_groups", list), models.groups)
    fragments, steps = [], {}
    for name, shape in models.shapes.items():
        files = {kind: TorchFile(_file_of(folder, name, kind)) for kind in (MASTER, *MOMENTS)}
        places = {kind: (_tensor(file, shape), 0) for kind, file in files.items()}
        fragments.append(Fragment(name, 0, math.prod(shape), places))
        path = _file_of(folder, name, "step")
        if path.exists():
            steps[scalar(TorchFile(path).content)] = name
    states = optimizer.content.get("optimizer_state_dict")
    states = states.get("state", {}) if isinstance(states, dict) else {}
    for state in states.values():
        if isinstance(state, dict) and "step" in state:
            steps[scalar(state["step"])] = OPTIMIZER_STATE.name
    if len(steps) > 1:
        (one, its), (other, name) = list(steps.items())[:2]
        raise mixed_steps(folder, f"{name} has had {other:g} updates, {its} {one:g}")
    if not steps:
        raise CheckpointError(
            "the optimizer's step is not in the files", where=str(folder), remedy="only Adam's state is read"
        )
    return TrainingState(
        folder=folder,
        title=f"DeepSpeed {models.version}, universal format",
        step=models.step,
        adam_step=int(next(iter(steps))),
        shapes=models.shapes,
        ranks=list(_shares(fragments)),
        frozen=models.frozen(),
        buffers=models.buffers,
        shared=models.shared,
        groups=groups,
        group_of=group_of,
    )


def write_universal(
    folder: Path,
    shapes: Mapping[str, Shape],
    stretches: Callable[[str, str], Iterator[torch.Tensor]],
    *,
    step: int,
    adam_step: int,
    groups: list[dict[str, Any]],
    names: list[list[str]],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a checkpoint in universal format, a stretch at a time.

    Args:
        folder: exists; the files of a tag go into it.
        shapes: of the trained parameters.
        stretches: gives the fp32 elements of (parameter, kind), in order and without gaps.
        groups: the optimizer's settings for each parameter group.
        names: the parameters of each group, in order.
        advance: told of each stretch's bytes.

    Raises:
        OSError: a file can't be written.
    """
    for name, shape in shapes.items():
        target = folder / "zero" / name
        target.mkdir(parents=True)
        for kind in (MASTER, *MOMENTS):
            _write_tensor(target / f"{kind}.pt", shape, stretches(name, kind), advance)
        torch.save(torch.tensor(float(adam_step)), target / "step.pt")
    numbered = [group | {"params": [number]} for number, group in enumerate(groups)]
    state = {0: {"step": torch.tensor(float(adam_step))}}
    optimizer = {
        "ds_version": _VERSION,
        "param_groups": numbered,  # where ZeRO-1 and 2 look
        "optimizer_state_dict": {"state": state, "param_groups": numbered},  # where ZeRO-3 does
    }
    torch.save(optimizer, folder / OPTIMIZER_STATE)
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shapes[name]) for name in group} for group in names],
        "shared_params": {},
        # Read by DeepSpeed's own schedulers and by those of torch.
        "lr_scheduler": {"last_batch_iteration": step - 1, "last_epoch": step, "_step_count": step + 1},
        "skipped_steps": step - adam_step,
        "global_steps": step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
    }
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # ZeRO-1 and 2; ZeRO-3
        torch.save(model, folder / file)


def _model_states(folder: Path) -> ModelStates:
    whole = folder / "mp_rank_00_model_states.pt"
    if whole.exists():
        return ModelStates([whole], partitioned=False)
    found = {int(match[1]): path for path in folder.iterdir() if (match := _RANK.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise CheckpointError(
            "the model states of a rank are missing",
            where=str(folder),
            remedy="copy all *model_states.pt files of the checkpoint into the folder",
        )
    return ModelStates([found[rank] for rank in sorted(found)], partitioned=True)


def _file_of(folder: Path, name: str, kind: str) -> Path:
    if Path(name).name != name:
        raise CheckpointError(f"{name[:200]!r} is no parameter's name", where=str(folder))
    return folder / "zero" / name / f"{kind}.pt"


def _tensor(file: TorchFile, shape: Shape) -> TensorRef:
    stored = file.content.get("param") if isinstance(file.content, dict) else file.content
    if not isinstance(stored, TensorRef) or not stored.dtype.is_floating_point:
        raise CheckpointError("the file holds no parameter", where=str(file.path), remedy="convert it again")
    if stored.shape not in (shape, (math.prod(shape),)):
        raise CheckpointError(
            f"the tensor has shape {stored.shape} and not {shape}, as the model states say",
            where=str(file.path),
            remedy="use files of one checkpoint; tensor parallelism is not read",
        )
    return stored


def _shares(fragments: list[Fragment]) -> Iterator[list[Fragment]]:
    share: list[Fragment] = []
    filled = 0
    for fragment in fragments:
        size = 12 * fragment.end
        if share and filled + size > FILE_BYTES:
            yield share
            share, filled = [], 0
        share.append(fragment)
        filled += size
    yield share


def _write_tensor(path: Path, shape: Shape, stretches: Iterator[torch.Tensor], advance: Callable[[int], None]) -> None:
    """torch.save({"param": tensor}) of a tensor that is never whole in memory."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"param": torch.empty(shape)}, path)
    offset = TorchFile(path).content["param"].offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        for values in stretches:
            stream.write(memoryview(values.view(torch.uint8).numpy()))
            advance(values.nbytes)
        if stream.tell() != offset + 4 * math.prod(shape):
            raise AssertionError(f"{path}: {stream.tell() - offset} bytes were given")
        stream.flush()
        os.fsync(stream.fileno())
