"""A loss or a gradient that is not finite on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.faults.ranks import FaultyRun

STEPS, BAD = 9, 7


def run(work: Path, fault: str, name: str, **changes) -> Path:
    recipe = runs.make_recipe(work, run_dir=str(work / name), duration=f"{STEPS} steps", **changes)
    for rank in FaultyRun(fault, recipe, NAN_STEPS=str(BAD)).end():
        assert rank.code == 0, rank.output
    return work / name


def states(run_dir: Path) -> list[tuple[str, str]]:
    """Both ranks' digests of masters, moments and Adam's step after each step."""
    by_rank = [(run_dir / f"digests_{rank}.txt").read_text().split() for rank in range(2)]
    assert len(by_rank[0]) == STEPS
    return list(zip(*by_rank, strict=True))


def assert_skipped(run_dir: Path, ranks: list[int]) -> None:
    found = states(run_dir)
    assert found[BAD - 1] == found[BAD - 2], "not a bit of the state has changed"
    assert len(set(found)) == STEPS - 1, "every other step changes it"
    [event] = [json.loads(line) for line in (run_dir / "health.jsonl").read_text().splitlines()]
    assert (event["step"], event["event"], event["nonfinite_ranks"]) == (BAD, "skipped step", ranks)
    assert all(key.startswith(("caption/c", "text/t")) for keys in event["keys"].values() for key in keys)
    assert len(event["keys"]["0"]) > 1 < len(event["keys"]["1"])


def test_nan_on_one_rank_skips_the_step_on_all_and_changes_no_bit(work):
    assert_skipped(run(work, "nan_loss", "nan"), ranks=[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "ds_config"),
    [("fp32", "zero0")] + [(p, z) for p in ("fp32", "bf16") for z in ("zero1", "zero2", "zero3", "zero3_offload")],
)
def test_the_steps_after_a_skipped_one_equal_a_run_without_that_batch(work, precision, ds_config):
    """Also for a gradient that is not finite where the loss is: a minute for each."""
    changes = {"engine__precision": precision, "engine__ds_config": ds_config}
    name = f"{ds_config}-{precision}"
    bad = run(work, "nan_loss", f"nan-{name}", **changes)
    assert_skipped(bad, ranks=[1])
    gradient = run(work, "infinite_gradient", f"gradient-{name}", **changes)
    assert_skipped(gradient, ranks=[])
    without = run(work, "without_batch", f"without-{name}", **changes)
    assert states(bad) == states(without) == states(gradient)
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
