"""A DeepSpeed checkpoint becomes a committed one, stretch by stretch; its files may be larger than the memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megablip.checkpoint.commit import CheckpointStore, committed
from megablip.checkpoint.deepspeed_state import Shape, TrainingState
from megablip.checkpoint.export import ExportReader, base_of
from megablip.checkpoint.slices import write_slices
from megablip.checkpoint.writer import progress_bar
from megablip.config import Config
from megablip.engine.optimizer import decays, parameter_groups, part_of
from megablip.engine.progress import Progress
from megablip.engine.schedule import learning_rates
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3Config
from megablip.model.lora import base_name
from megablip.records import MASTER, MOMENTS, LocalSlice

_COMPARED = 1 << 20  # elements at once
_SETTINGS = ("weight_decay", "betas", "eps")


def import_zero(
    state: TrainingState,
    config: Config,
    trained: Mapping[str, Shape],
    lane_states: dict[int, np.ndarray],
    *,
    tokens: int | None = None,
    allow_changes: bool = False,
) -> Path:
    """Commit a DeepSpeed checkpoint as one of the run that a recipe names; its folder.

    The run goes on with the masters, moments and steps found there, and with its
    own data from their beginning. Random states are not carried over.

    Args:
        trained: shapes of the parameters that the recipe trains.
        lane_states: of all lanes, at the state's step.
        tokens: trained so far; None: not known.
        allow_changes: the recipe's decay, betas and eps may differ from the run's.

    Raises:
        CheckpointError: it holds another model, frozen weights that are not those of
            `model.path`, or another optimizer; or the checkpoint can't be written.
        ConfigError: the run has checkpoints already, or its schedule needs `tokens`.
    """
    store_folder = Path(config.run_dir) / "checkpoints"
    if committed(store_folder):
        raise ConfigError("the run has checkpoints already", where=str(store_folder), remedy="choose a new run_dir")
    if tokens is None and "tokens" in (config.duration.unit, config.optimizer.warmup.unit):
        raise ConfigError(
            "the recipe counts tokens, and DeepSpeed's files don't tell how many were trained",
            where="duration, optimizer.warmup",
            remedy="give their number with --tokens",
        )
    export = ExportReader(config.model.path)
    _check_trained(state, trained, config)
    _check_frozen(state, export)
    changes = _optimizer_changes(state, config)
    if changes and not allow_changes:
        raise CheckpointError(
            f"the recipe's optimizer is another one: {changes[0]}; so it is for {len(changes) - 1} more parameters",
            where=f"{state.folder}, optimizer",
            remedy="set optimizer.weight_decay, betas and eps as they were, or accept it with --allow-changes",
        )
    progress = Progress(step=state.step, tokens=tokens or 0)
    trainer_state = {
        "progress": asdict(progress),
        "adam_step": state.adam_step,
        "groups": _groups(state, config),
        "base": base_of(export, Blip3Config.of_run(config.model)),
        "world": len(state.ranks),
        "sources": [source.name for source in config.data.sources],
        "config": config.model_dump(mode="json", by_alias=True),
        "imported": {"from": str(state.folder), "title": state.title},
    }
    _report(state, config, progress)
    return _write(state, store_folder, config.checkpoint.keep, lane_states, trainer_state)


@dataclass(frozen=True)
class _Rank:
    """Stands in for the topology of a rank that exists no more: one process writes all their files."""

    rank: int
    world: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        return [value]


def _write(
    state: TrainingState, folder: Path, keep: int, lane_states: dict[int, np.ndarray], trainer_state: dict[str, Any]
) -> Path:
    world = len(state.ranks)
    stores = [CheckpointStore(folder, keep, _Rank(rank, world)) for rank in range(world)]
    pieces = [
        [
            LocalSlice(f.name, state.shapes[f.name], f.start, f.end, {k: f.values(k) for k in (MASTER, *MOMENTS)})
            for f in fragments
        ]
        for fragments in state.ranks
    ]
    total = sum(values.numel() * 4 for rank in pieces for piece in rank for values in piece.tensors.values())
    try:
        with progress_bar() as progress, ThreadPoolExecutor(os.cpu_count()) as threads:
            task = progress.add_task("importing", total=total)

            def write(rank: int) -> None:
                stores[rank].write(
                    state.step,
                    lambda path: write_slices(path, pieces[rank], advance=lambda size: progress.advance(task, size)),
                    lane_states if rank == 0 else {},
                )

            stores[0].sweep()
            for _ in threads.map(write, range(world)):
                pass
            stores[0].commit(state.step, trainer_state)
    except BaseException as error:
        stores[0].sweep()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint could not be written: {error}", where=str(folder), remedy="free space on the disk"
            ) from None
        raise
    return stores[0].path(state.step)


def _check_trained(state: TrainingState, trained: Mapping[str, Shape], config: Config) -> None:
    difference = sorted(state.shapes.keys() ^ trained.keys())
    if difference:
        name = difference[0]
        raise CheckpointError(
            f"{name} is trained {'there, but not' if name in state.shapes else 'here, but not there'}"
            f"{' by the recipe' if name in state.shapes else ''}, and {len(difference) - 1} others differ, too",
            where=f"{state.folder}, {config.model.path}",
            remedy="model.train_tower and model.lora say what is trained; --strip-prefix takes away what all names "
            "there begin with",
        )
    for name, shape in trained.items():
        if tuple(shape) != state.shapes[name]:
            raise CheckpointError(
                f"{name} is {state.shapes[name]} there and {tuple(shape)} in the model",
                where=f"{state.folder}, {config.model.path}",
                remedy="give the folder of the same model as model.path",
            )


def _check_frozen(state: TrainingState, export: ExportReader) -> None:
    """What is not trained comes from `model.path`: it must be what that run had."""
    known = set(export.names)
    for name, (shape, fragments) in state.frozen.items():
        ours = base_name(name)
        if ours not in known or export.shape(ours) != shape:
            raise CheckpointError(
                f"{name} {shape}, frozen there, is not in the model",
                where=f"{state.folder}, {export.folder}",
                remedy="give the folder that the run began with as model.path",
            )
        for fragment in fragments:
            values = fragment.values(MASTER)
            for start in range(fragment.start, fragment.end, _COMPARED):
                end = min(start + _COMPARED, fragment.end)
                theirs = values[start - fragment.start : end - fragment.start]
                if not torch.equal(export.elements(ours, start, end).to(theirs.dtype), theirs):
                    raise CheckpointError(
                        f"{name} is frozen, but has other values there than in the model",
                        where=f"{state.folder}, {export.folder}",
                        remedy="give the folder that the run began with as model.path",
                    )


def _optimizer_changes(state: TrainingState, config: Config) -> list[str]:
    """Parameters whose updates would follow other settings than before."""
    changes = []
    for name, shape in state.shapes.items():
        theirs = state.groups[state.group_of[name]] if name in state.group_of else {}
        ours = _ours(config, name, shape)
        changes += [
            f"{name} had {key} {theirs[key]} and would have {ours[key]}"
            for key in _SETTINGS
            if key in theirs and _plain(theirs[key]) != _plain(ours[key])
        ][:1]
    return changes


def _ours(config: Config, name: str, shape: Shape) -> dict[str, Any]:
    optimizer = config.optimizer
    decay = optimizer.weight_decay if decays(name, shape) else 0.0
    return {"weight_decay": decay, "betas": optimizer.betas, "eps": optimizer.eps}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _groups(state: TrainingState, config: Config) -> list[dict[str, Any]]:
    """As ZeroEngine.group_settings tells them, with the learning rates of the run that is taken over."""
    groups = parameter_groups(((name, name, shape) for name, shape in state.shapes.items()), config.optimizer)
    settings = []
    for group in groups:
        name = group.pop("params")[0]
        theirs = state.groups[state.group_of[name]] if name in state.group_of else {}
        settings.append(group | _ours(config, name, state.shapes[name]) | {"lr": theirs.get("lr")})
    return settings


def _report(state: TrainingState, config: Config, progress: Progress) -> None:
    print(f"{state.title}: step {state.step}, {state.adam_step} updates, {len(state.shapes)} trained parameters")
    rates = learning_rates(
        config.optimizer, config.duration, step=progress.step, tokens=progress.tokens, epochs=progress.epochs
    )
    found = {(part_of(name), state.groups[number].get("lr")) for name, number in state.group_of.items()}
    for part, rate in sorted(found, key=str):
        print(f"learning rate of the {part}: {rate} there, {rates[part]:g} next here")
