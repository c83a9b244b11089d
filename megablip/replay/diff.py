"""`megablip replay RUN --diff OTHER_RUN`: the first step at which two runs part, in data, loss or weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megablip.checkpoint.commit import Checkpoint, committed, open_checkpoint
from megablip.checkpoint.slices import SliceReader
from megablip.config import identity_changes, load_config
from megablip.errors import MegablipError
from megablip.metrics.points import read_metrics
from megablip.records import MASTER, MOMENTS
from megablip.replay.batch import ReplayedStep, rebuild
from megablip.replay.step import printable

Finding = tuple[int | None, str]
"""First step that differs (None: no one does), and what to say of it."""


def compare(one: Path, other: Path) -> bool:
    """Print where two runs first differ; whether they are the same in all that both have.

    Losses and data digests are compared step by step, lanes, weights and
    moments bit by bit at the checkpoints that both have, at any numbers of ranks.

    Raises:
        ConfigError: a folder that is no run.
        CheckpointError: a damaged checkpoint.
        MegablipError: the runs have no step and no checkpoint in common.
    """
    for change in identity_changes(load_config(one / "config.yaml"), load_config(other / "config.yaml")):
        print(f"recipe: {printable(change)}")
    points = [{point["step"]: point for point in read_metrics(run)} for run in (one, other)]
    common = sorted(points[0].keys() & points[1].keys())
    names = [{folder.name: folder for folder in committed(run / "checkpoints")} for run in (one, other)]
    checkpoints = [(names[0][name], names[1][name]) for name in sorted(names[0].keys() & names[1].keys())]
    if not common and not checkpoints:
        raise MegablipError("the runs have no step and no checkpoint in common", where=f"{one}, {other}")
    pairs = [(step, points[0][step], points[1][step]) for step in common]
    data_step, data = _data(pairs, one, other)
    found = {"data": (data_step, data), "loss": _loss(pairs), "weights": _weights(checkpoints)}
    for name, (_, text) in found.items():
        print(f"{name}: {printable(text)}")
    parted = [(step, name) for name, (step, _) in found.items() if step is not None]
    if parted:
        step, name = min(parted, key=lambda item: item[0])
        print(f"first difference: step {step} ({name})")
    return not parted


def _data(pairs: list[tuple[int, Any, Any]], one: Path, other: Path) -> Finding:
    known = [(step, a.get("data_digest"), b.get("data_digest")) for step, a, b in pairs]
    known = [item for item in known if None not in item]
    if not known:
        return None, "no step has a digest in both runs"
    for step, a, b in known:
        if a != b:
            return step, f"first differ at step {step}: {_sequence_that_differs(one, other, step)}"
    return None, f"the same in all {len(known)} steps that both have logged"


def _sequence_that_differs(one: Path, other: Path, step: int) -> str:
    """In words; needs the shards of both runs."""
    try:
        steps = [rebuild(run, step, lambda text: None) for run in (one, other)]
    except MegablipError as error:
        return f"the digests differ, and the batches can't be rebuilt to say where ({error.what})"
    for number, (a, b) in enumerate(zip(steps[0].sequences, steps[1].sequences, strict=False)):
        if a.packed.digest != b.packed.digest:
            where, keys = f"lane {a.packed.lane}, sequence {a.packed.index}", [_keys(found, number) for found in steps]
            if a.packed.keys == b.packed.keys:
                return f"{where} has the same keys and other tokens"
            return f"{where} holds {keys[0]}, and in the other {keys[1]}"
    counts = [len(found.sequences) for found in steps]
    if counts[0] != counts[1]:
        return f"{counts[0]} sequences, and {counts[1]} in the other"
    return "the digests differ, though the batches rebuilt now do not: shards or recipe have changed since"


def _keys(step: ReplayedStep, number: int) -> str:
    keys = [f"{sample.source}/{sample.key}" for sample in step.sequences[number].samples]
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") or "nothing"


def _loss(pairs: list[tuple[int, Any, Any]]) -> Finding:
    if not pairs:
        return None, "no step is logged in both runs"
    relative = [(step, _relative(a["loss"], b["loss"])) for step, a, b in pairs]
    different = [(step, by) for step, by in relative if by]
    if not different:
        return None, f"bit for bit the same in all {len(pairs)} steps that both have logged"
    first, by = different[0]
    values = next((a["loss"], b["loss"]) for step, a, b in pairs if step == first)
    worst_step, worst = max(different, key=lambda item: item[1])
    return first, (
        f"first differs at step {first}: {values[0]!r} and {values[1]!r} (relative {by:.1e}); "
        f"at most {worst:.1e}, at step {worst_step}"
    )


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    by = abs(a - b) / max(abs(a), abs(b))
    return by if math.isfinite(by) else math.inf


def _weights(folders: list[tuple[Path, Path]]) -> Finding:
    if not folders:
        return None, "no step has a checkpoint in both runs"
    for pair in folders:
        a, b = (open_checkpoint(folder) for folder in pair)
        if text := _lanes(a, b) or _adam_steps(a, b) or _tensors(a, b):
            return a.step, f"first differ at step {a.step}: {text}"
    steps = ", ".join(str(int(folder.name.removeprefix("step_"))) for folder, _ in folders)
    return None, f"with moments and lanes bit for bit the same at the steps {steps}"


def _lanes(a: Checkpoint, b: Checkpoint) -> str:
    one, other = a.lane_states(), b.lane_states()
    if one.keys() != other.keys():
        return f"{len(one)} lanes, and {len(other)} in the other"
    lanes = [lane for lane in sorted(one) if not np.array_equal(one[lane], other[lane])]
    return f"the data state of lane {lanes[0]}" + (f" and {len(lanes) - 1} more" if lanes[1:] else "") if lanes else ""


def _adam_steps(a: Checkpoint, b: Checkpoint) -> str:
    one, other = a.trainer_state["adam_step"], b.trainer_state["adam_step"]
    return f"{one} updates of the optimizer, and {other} in the other" if one != other else ""


def _tensors(a: Checkpoint, b: Checkpoint) -> str:
    one, other = SliceReader(a.folder), SliceReader(b.folder)
    if names := sorted(one.parameters.keys() ^ other.parameters.keys()):
        return f"{names[0]} is in one of them only"
    differ: list[str] = []
    first = ""
    for name in one.parameters:
        if one.parameters[name].shape != other.parameters[name].shape:
            return f"{name} has shape {one.parameters[name].shape}, and {other.parameters[name].shape} in the other"
        for kind in (MASTER, *MOMENTS):
            values, others = one.whole(name, kind), other.whole(name, kind)
            # As bits, so that NaN equals NaN.
            unequal = values.view(torch.int32) != others.view(torch.int32)
            if unequal.any():
                differ.append(name)
                by = (values - others).abs().max().item()
                count = f"{int(unequal.sum())} of {values.numel()} elements"
                first = first or f"{name}|{kind}, {count}, by at most {by:.1e}"
    return f"{first}; {len(set(differ))} of {len(one.parameters)} parameters differ" if first else ""
