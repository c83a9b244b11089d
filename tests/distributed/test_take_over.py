"""Runs that change hands: from DeepSpeed alone to megablip, and back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megablip.checkpoint.commit import newest_committed, open_checkpoint
from megablip.checkpoint.deepspeed_files import read_zero
from megablip.checkpoint.slices import SliceReader
from megablip.records import MASTER, MOMENTS
from tests.distributed import runs
from tests.distributed.ranks import run_ranks

STEPS = 3
ZERO3 = {"stage": 3, "sub_group_size": 9000}
SETTINGS = {
    "engine__precision": "fp32",
    "optimizer__schedule": "constant",
    "optimizer__warmup": "0 steps",
    "optimizer__lr_by_part": {"sampler": 0.003},
    "optimizer__lr": 0.002,
    "optimizer__weight_decay": 0.3,
    "optimizer__betas": [0.8, 0.9],
    "duration": f"{2 * STEPS} steps",
}


def elsewhere(work: Path, folder: Path, strategies: list[dict], world: int) -> list[list[float]]:
    """Train with DeepSpeed alone; checkpoints in folder/0, folder/1, ...; the losses after them."""
    recipe = runs.make_recipe(work, **SETTINGS, run_dir=str(folder / "unused"))
    shutil.copy(recipe, folder / "elsewhere.yaml")
    found = run_ranks(
        world, "tests.distributed.elsewhere:train", str(folder / "elsewhere.yaml"), str(folder), strategies, STEPS
    )
    return found[0]


def take_over(work: Path, source: Path, run_dir: Path, *options: str, check: int | None = 0, **changes):
    recipe = runs.make_recipe(work, **SETTINGS | {"run_dir": str(run_dir)} | changes)
    shutil.copy(recipe, run_dir.with_suffix(".yaml"))
    done = runs.run_python(
        "-m", "megablip.cli", "convert", "import-zero", str(source), str(run_dir.with_suffix(".yaml")), *options,
        check=check,
    )  # fmt: skip
    return run_dir.with_suffix(".yaml"), done


def losses_after(run_dir: Path, step: int) -> list[float]:
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    points = [point for point in points if "loss" in point]
    assert [point["step"] for point in points] == list(range(step + 1, step + 1 + len(points)))
    return [point["loss"] for point in points]


def assert_same_state(run_dir: Path, source: Path) -> None:
    """Every master and moment that was imported is the one in DeepSpeed's files."""
    reader, state = SliceReader(newest_committed(run_dir)), read_zero(source)
    assert reader.shapes == state.shapes
    for fragment in state.fragments():
        for kind in (MASTER, *MOMENTS):
            shape = state.shapes[fragment.name]
            found = reader.read(fragment.name, kind, shape, fragment.start, fragment.end)
            assert torch.equal(found, fragment.values(kind)), (fragment.name, kind)


@pytest.mark.slow
def test_a_deepspeed_run_goes_on_here(work, tmp_path):
    """From ZeRO-3 at two ranks to one; a minute and a half."""
    (expected,) = elsewhere(work, tmp_path, [ZERO3], world=2)
    recipe, done = take_over(work, tmp_path / "0", tmp_path / "run")
    assert "learning rate of the sampler: 0.003 there, 0.003 next here" in done.stdout
    assert_same_state(tmp_path / "run", tmp_path / "0")
    checkpoint = open_checkpoint(newest_committed(tmp_path / "run"))
    assert checkpoint.step == checkpoint.trainer_state["adam_step"] == STEPS
    assert {group["lr"] for group in checkpoint.trainer_state["groups"]} == {0.002, 0.003}
    runs.train(recipe, "engine.ranks=1")
    found = losses_after(tmp_path / "run", STEPS)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_run_of_ours_goes_on_with_deepspeed_alone(work, tmp_path):
    """Through export-zero to engines of ZeRO-1, 2 and 3; two minutes."""
    recipe = runs.make_recipe(work, **SETTINGS | {"run_dir": str(tmp_path / "run")})
    runs.train(recipe, f"stop_after_steps={STEPS}", "engine.ranks=2", check=75)
    shutil.copy(recipe, tmp_path / "recipe.yaml")
    runs.run_python("-m", "megablip.cli", "convert", "export-zero", str(tmp_path / "run"), str(tmp_path / "universal"))
    # The data begin anew there, as they do in a run that is taken over.
    take_over(work, tmp_path / "universal", tmp_path / "back")
    source = newest_committed(tmp_path / "run")
    ours, back = SliceReader(source), SliceReader(newest_committed(tmp_path / "back"))
    assert ours.shapes == back.shapes
    for name, shape in ours.shapes.items():
        for kind in (MASTER, *MOMENTS):
            one, other = (reader.read(name, kind, shape, 0, math.prod(shape)) for reader in (ours, back))
            assert torch.equal(one, other)
    runs.train(tmp_path / "back.yaml", "engine.ranks=1")
    expected = losses_after(tmp_path / "back", STEPS)
    arguments = [str(tmp_path / "recipe.yaml"), str(tmp_path / "universal")]
    strategies = [{"stage": 1}, {"stage": 2}, ZERO3]
    for found in run_ranks(2, "tests.distributed.elsewhere:go_on", *arguments, strategies, STEPS)[0]:
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_runs_of_every_stage_go_on_at_every_world_size(work, tmp_path, world):
    """From ZeRO-1, 2 and 3 at 1, 2 and 4 ranks to each other number of ranks; two minutes each."""
    strategies = [{"stage": 1}, {"stage": 2}, ZERO3]
    expected = elsewhere(work, tmp_path, strategies, world)
    for number, ranks in enumerate({1: (2, 4, 1), 2: (1, 2, 4), 4: (2, 1, 4)}[world]):
        run_dir = tmp_path / f"run{number}"
        recipe, _ = take_over(work, tmp_path / str(number), run_dir)
        assert_same_state(run_dir, tmp_path / str(number))
        runs.train(recipe, f"engine.ranks={ranks}")
        assert losses_after(run_dir, STEPS) == pytest.approx(expected[number], abs=1e-5)
