"""A loss or a gradient that is not finite on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megablip.checkpoint.slices import SliceReader
from megablip.records import MASTER, MOMENTS
from tests.distributed import runs
from tests.faults.ranks import FaultyRun

STEPS, BAD = 9, 7


def run(work: Path, fault: str, name: str, **changes) -> Path:
    recipe = runs.make_recipe(
        work, run_dir=str(work / name), duration=f"{STEPS} steps", checkpoint__every_steps=1, checkpoint__keep=STEPS,
        **changes,
    )  # fmt: skip
    for rank in FaultyRun(fault, recipe, NAN_STEPS=str(BAD)).end():
        assert rank.code == 0, rank.output
    return work / name


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Masters and moments."""
    reader = SliceReader(run_dir / "checkpoints" / f"step_{step:08d}")
    return {f"{name}|{kind}": reader.whole(name, kind) for name in reader.parameters for kind in (MASTER, *MOMENTS)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def adam_step(run_dir: Path, step: int) -> int:
    text = (run_dir / "checkpoints" / f"step_{step:08d}" / "trainer_state.json").read_text()
    return json.loads(text)["adam_step"]


def assert_skipped(run_dir: Path, ranks: list[int]) -> None:
    assert same(state(run_dir, BAD - 1), state(run_dir, BAD)), "not a bit of the state has changed"
    assert not same(state(run_dir, BAD), state(run_dir, BAD + 1))
    assert (adam_step(run_dir, BAD), adam_step(run_dir, STEPS)) == (BAD - 1, STEPS - 1)
    [event] = [json.loads(line) for line in (run_dir / "health.jsonl").read_text().splitlines()]
    assert (event["step"], event["event"], event["nonfinite_ranks"]) == (BAD, "skipped step", ranks)
    assert all(key.startswith(("caption/c", "text/t")) for keys in event["keys"].values() for key in keys)
    assert len(event["keys"]["0"]) > 1 < len(event["keys"]["1"])


def test_nan_on_one_rank_skips_the_step_on_all_and_changes_no_bit(work):
    assert_skipped(run(work, "nan_loss", "nan"), ranks=[1])


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_steps_after_a_skipped_one_equal_a_run_without_that_batch(work, precision, ds_config):
    """Also for a gradient that is not finite where the loss is: a minute for each."""
    changes = {"engine__precision": precision, "engine__ds_config": ds_config}
    name = f"{ds_config}-{precision}"
    bad = run(work, "nan_loss", f"nan-{name}", **changes)
    assert_skipped(bad, ranks=[1])
    gradient = run(work, "infinite_gradient", f"gradient-{name}", **changes)
    assert_skipped(gradient, ranks=[])
    without = run(work, "without_batch", f"without-{name}", **changes)
    for step in (BAD, BAD + 1, STEPS):
        assert same(state(bad, step), state(without, step)), f"step {step}"
        assert same(state(bad, step), state(gradient, step)), f"step {step}"
    losses = [runs.losses(folder) for folder in (bad, without, gradient)]
    for found in losses:
        assert found[: BAD - 1] + found[BAD:] == losses[0][: BAD - 1] + losses[0][BAD:]


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_with_the_reason(work):
    """20 s."""
    recipe = runs.make_recipe(work, run_dir=str(work / "row"), health__max_skipped_in_a_row=2)
    for rank in FaultyRun("nan_loss", recipe, NAN_STEPS="2,3,4").end():
        assert rank.code == 1
        assert "DivergenceError: 2 steps in a row had a loss or a gradient that is not finite" in rank.output
    assert runs.outcome(work / "row") == "failed"
