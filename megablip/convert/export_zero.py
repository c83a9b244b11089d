"""A committed checkpoint in DeepSpeed's universal format, so that its run can go on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megablip.checkpoint.commit import Checkpoint, newest_committed, open_checkpoint
from megablip.checkpoint.deepspeed_universal import write_universal
from megablip.checkpoint.slices import SliceReader
from megablip.checkpoint.writer import new_folder, progress_bar
from megablip.config import parse_config
from megablip.convert.folders import say_written
from megablip.convert.sources import stretches
from megablip.engine.optimizer import parameter_groups


def export_zero(source: Path, output: Path) -> None:
    """Write masters, moments, steps and settings of the parameter groups as DeepSpeed's engines load them.

    An engine with `"checkpoint": {"load_universal": true}` and the same model goes on
    from it with `load_checkpoint(output)`, at any number of ranks and ZeRO stage. Its
    parameter groups must be ours: each part of the model (sampler, decoder, tower, in the
    order of its parameters), with and without decay. Under ZeRO-3 DeepSpeed 0.19 itself
    gives every group the settings of the first one, and all sub-groups one and the same
    `step` tensor, which torch's AdamW then counts up once for each: set the settings, and
    clone the tensors, after loading (tests/distributed/elsewhere.py does).
    Frozen weights are not among the files; they lie in the folder the run began with.

    Args:
        source: a run directory (its newest checkpoint) or one checkpoint's folder.

    Raises:
        CheckpointError: nothing committed, a damaged file, or the output can't be written.
        ConfigError: `output` exists.
    """
    source = source.resolve()
    folder = source if (source / "COMMITTED").exists() else newest_committed(source)
    checkpoint, reader = open_checkpoint(folder), SliceReader(folder)
    groups, names = _groups(checkpoint, reader)

    def elements(name: str, kind: str) -> Iterator[torch.Tensor]:
        shape = reader.shapes[name]
        for start, end in stretches(shape):
            yield reader.read(name, kind, shape, start, end)

    total = 12 * sum(torch.Size(shape).numel() for shape in reader.shapes.values())
    with new_folder(output) as staging, progress_bar() as progress:
        task = progress.add_task("exporting", total=total)
        (staging / folder.name).mkdir()
        write_universal(
            staging / folder.name,
            reader.shapes,
            elements,
            step=checkpoint.step,
            adam_step=checkpoint.trainer_state["adam_step"],
            groups=groups,
            names=names,
            advance=lambda size: progress.advance(task, size),
        )
        (staging / "latest_universal").write_text(folder.name)
    say_written(output, folder.name)


def _groups(checkpoint: Checkpoint, reader: SliceReader) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The settings of each parameter group when the checkpoint was made, and its parameters."""
    optimizer = parse_config(checkpoint.trainer_state["config"], where=str(checkpoint.folder)).optimizer
    groups = parameter_groups(((name, name, shape) for name, shape in reader.shapes.items()), optimizer)
    names = [group.pop("params") for group in groups]
    settings = []
    for group in groups:
        # No two groups of one part and decay were set otherwise.
        saved = next(g for g in checkpoint.trainer_state["groups"] if group.items() <= g.items())
        settings.append({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    return settings, names
