"""Exactness: a run that was cut equals one that was not; ranks may come and go.

The stage is counted in epochs, so that small sources come round several times
and each lane's packing buffer drains at the end: a cut there finds it half
empty.  One such cut is in test_replay.py, where it is quick.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megablip.checkpoint.commit import open_checkpoint
from megablip.data.lanes import LaneState
from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.distributed.exact import different
from tests.distributed.ranks import run_ranks

BUFFER = 24  # documents; a lane packs four to six a step, so it drains over four steps or more


def recipe_of(work: Path, name: str, precision: str, epochs: int) -> Path:
    folder = work / name
    folder.mkdir()
    path = runs.make_recipe(
        work, run_dir=str(folder / "straight"), duration=f"{epochs} epochs", data__packing_buffer=BUFFER,
        engine__precision=precision, deterministic=True, checkpoint__every_steps=1000,
    )  # fmt: skip
    return path.rename(folder / "recipe.yaml")


def points(run_dir: Path) -> list[tuple[int, float, float, str]]:
    """What each step must have in common with another run's."""
    found = [(p["step"], p["loss"], p["grad_norm"], p["data_digest"]) for p in read_metrics(run_dir)]
    assert [step for step, *_ in found] == list(range(1, len(found) + 1))
    return found


def waiting(run_dir: Path, step: int) -> list[int]:
    """How many documents wait in each lane."""
    states = open_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}").lane_states()
    return [len(LaneState(state).waiting) for state in states.values()]


def train(world: int, recipe: Path, *attempts: list[str]) -> list[list[dict[str, Any]]]:
    return run_ranks(world, "tests.distributed.exact:train_in_turn", str(recipe), attempts, timeout_s=1200)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twelve_cuts_change_no_bit(work, precision):
    """42 steps over five epochs: cut at 20, in the first epoch, as the buffer drains, at 9 random steps.

    7 minutes for each precision on two cores that do other things too.
    """
    recipe = recipe_of(work, precision, precision, epochs=5)
    folder = recipe.parent
    straight = folder / "straight"
    train(2, recipe, [])
    expected = points(straight)
    steps = len(expected)
    assert steps >= 40
    assert read_metrics(straight)[19]["epochs_by_source/caption"] > 1
    chosen = {20, 3, steps - 2}
    left = [step for step in range(1, steps) if step not in chosen]
    cuts = sorted(chosen | set(random.Random(f"cuts {precision}").sample(left, 9)))
    attempts = [[f"run_dir={folder}/cut-{cut}", *stop] for cut in cuts for stop in ([f"stop_after_steps={cut}"], [])]
    for rank in train(2, recipe, *attempts):
        assert [bool(load) for load in rank] == [False, True] * len(cuts), "each second attempt resumes"
        assert all(load["loaded"] and not load["differ"] for load in rank if load)
    for cut in cuts:
        run_dir = folder / f"cut-{cut}"
        assert points(run_dir) == expected, f"cut at {cut}"
        assert different(run_dir, straight, steps) == [], f"cut at {cut}"
    assert any(0 < count < BUFFER // 2 for count in waiting(folder / f"cut-{steps - 2}", steps - 2))


@pytest.mark.slow
def test_four_ranks_then_three_then_one_then_four_equal_one_rank(work):
    """The data of each step are the same, loads exact, losses agree to rounding (fp32); 3 minutes."""
    recipe = recipe_of(work, "worlds", "fp32", epochs=5)
    alone, changing = recipe.parent / "straight", recipe.parent / "changing"
    [[first]] = train(1, recipe, ["stop_after_steps=24"])
    assert first == {}, "nothing to load"
    for before, (world, stop) in pairwise([None, (4, 6), (3, 12), (1, 18), (4, 24)]):
        ranks = train(world, recipe, [f"run_dir={changing}", f"stop_after_steps={stop}"])
        for [load] in ranks:
            assert bool(load) == bool(before)
            assert load.get("differ", []) == []
        if before:
            assert sum(load["loaded"] for [load] in ranks) > 100_000
    expected, found = points(alone), points(changing)
    assert [digest for *_, digest in found] == [digest for *_, digest in expected]
    assert len({digest for *_, digest in found}) == 24
    for (step, loss, norm, _), (_, other, other_norm, _) in zip(expected, found, strict=True):
        assert other == pytest.approx(loss, rel=1e-5), f"step {step}"
        assert other_norm == pytest.approx(norm, rel=1e-3), f"step {step}"
