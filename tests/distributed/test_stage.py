"""Stages that are counted in epochs, and sources that change on the way, in real runs."""

from __future__ import annotations

import json

import pytest

from megablip.config import load_config
from megablip.errors import ConfigError
from megablip.launch import prepare_run
from megablip.metrics.points import read_metrics
from tests.distributed import runs


def test_a_stage_of_two_epochs_trains_each_sample_twice(work):
    run_dir = work / "epochs"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration="2 epochs", checkpoint__every_steps=3)
    runs.train(recipe, "stop_after_steps=2", check=75)
    runs.train(recipe, "engine.ranks=1")  # two lanes of four go to another rank
    points = read_metrics(run_dir)
    assert points[-1]["documents_seen"] == 2 * 120
    assert points[-1]["epochs_by_source/caption"] == points[-1]["epochs_by_source/text"] == 2
    rates = [point["learning_rate"] for point in points]
    assert rates[-1] < rates[2] / 4, "the cosine follows the epochs"
    assert runs.outcome(run_dir) == "finished"


def test_sources_change_on_resume_if_that_is_allowed(work):
    run_dir = work / "sources"
    recipe = runs.make_recipe(work, run_dir=str(run_dir))
    runs.train(recipe, "stop_after_steps=2", check=75)
    changed = [
        {"name": "text", "shards": str(work / "data" / "text-*.tar"), "schema": "text", "weight": 1},
        {"name": "more", "shards": str(work / "data" / "caption-*.tar"), "schema": "caption", "weight": 3},
    ]
    overrides = [f"data.sources={json.dumps(changed)}"]
    with pytest.raises(ConfigError, match=r"data\.sources") as caught:
        prepare_run(load_config(recipe, overrides))
    assert "allow_changes takes data.sources" in caught.value.remedy
    done = runs.train(recipe, *overrides, "allow_changes=[data.sources]")
    assert "sources changed: source more is new; source 0 of the checkpoint's list" in done.stdout
    [*_, last] = read_metrics(run_dir)
    assert last["step"] == 6
    assert last["epochs_by_source/more"] > 0
