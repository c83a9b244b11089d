"""A vision tower that is trained inside the engine, in real runs. Four minutes on two busy cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megablip.checkpoint.slices import SliceReader
from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.distributed.ranks import run_ranks

STEPS = 6
RATES = {"decoder": 0.01, "sampler": 0.005, "tower": 0.002}

pytestmark = pytest.mark.slow


def recipe_of(work: Path, name: str, **changes) -> Path:
    changes = {
        "run_dir": str(work / name),
        "duration": f"{STEPS} steps",
        "model__train_tower": True,
        "model__activation_checkpointing": True,
        "optimizer__lr": RATES["decoder"],
        "optimizer__lr_by_part": {part: RATES[part] for part in ("sampler", "tower")},
    } | changes
    return runs.make_recipe(work, **changes)


@pytest.fixture(scope="module")
def straight(work) -> Path:
    runs.train(recipe_of(work, "tower"))
    return work / "tower"


def masters(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = SliceReader(run_dir / "checkpoints" / f"step_{STEPS:08d}")
    return {name: reader.whole(name) for name in reader.parameters}


def test_the_tower_is_trained_at_its_own_rate(work, straight):
    start, trained = load_file(work / "start" / "model.safetensors"), masters(straight)
    assert set(trained) == set(start)
    for name, value in trained.items():
        assert not torch.equal(value, start[name]), name
    for point in read_metrics(straight):
        for part in ("sampler", "tower"):
            ratio = point[f"learning_rate_by_part/{part}"] / point["learning_rate"]
            assert ratio == pytest.approx(RATES[part] / RATES["decoder"])
    assert runs.losses(straight)[-1] < runs.losses(straight)[0]


def test_stopped_and_resumed_equals_straight_bit_for_bit(work, straight):
    recipe = recipe_of(work, "tower-resumed")
    runs.train(recipe, "stop_after_steps=3", check=75)
    runs.train(recipe)
    assert runs.losses(work / "tower-resumed") == runs.losses(straight)
    for name, value in masters(straight).items():
        assert torch.equal(value, masters(work / "tower-resumed")[name]), name


def test_one_rank_trains_the_same(work):
    found = []
    for ranks in (1, 2):
        recipe = recipe_of(work, f"tower-{ranks}", engine__ranks=ranks, engine__precision="fp32")
        runs.train(recipe)
        found.append(runs.losses(work / f"tower-{ranks}"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_export_equals_the_trained_weights_and_generates_the_same(work, straight):
    export = work / "tower-export"
    runs.run_python("-m", "megablip.cli", "convert", "zero-to-hf", str(straight), str(export), "--dtype", "bf16")
    written = load_file(export / "model.safetensors")
    for name, value in masters(straight).items():
        assert torch.equal(written[name], value.bfloat16()), name
    for found in run_ranks(2, "tests.distributed.generation:compare", str(straight), str(export)):
        assert found["weights_equal"] == len(written)
        assert found["trainer"] == found["export"]
        assert all(found["trainer"])


def test_a_run_does_not_go_on_with_a_frozen_tower(work, straight):
    done = runs.train(recipe_of(work, "tower", optimizer__lr_by_part={}, model__train_tower=False), check=1)
    assert "model.train_tower" in done.stderr
