"""What a run tells of itself, and that telling it changes nothing."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megablip.checkpoint.slices import SliceReader
from megablip.metrics.points import read_metrics
from tests.distributed import runs

STEPS = 6


def held_out(work) -> list[dict]:
    """Two sources with fewer sequences than a global batch has: some ranks have only dummies."""
    return [
        {"name": "seen", "shards": str(work / "data" / "caption-0.tar"), "schema": "caption", "weight": 3},
        {"name": "read", "shards": str(work / "data" / "text-1.tar"), "schema": "text", "weight": 1},
    ]


@pytest.fixture(scope="module")
def recorded(work):
    """A run on two ranks with everything that can be recorded."""
    run_dir = work / "recorded"
    recipe = runs.make_recipe(
        work, run_dir=str(run_dir), duration=f"{STEPS} steps",
        log={"every_steps": 2, "picture_every_steps": 4, "profile_steps": [2]},
        held_out={"sources": held_out(work), "every_steps": 3, "batches": 3},
    )  # fmt: skip
    done = runs.train(recipe)
    return run_dir, done.stdout


def test_recording_changes_no_weight_and_no_moment(work, recorded):
    run_dir, _ = recorded
    plain = work / "plain"
    runs.train(runs.make_recipe(work, run_dir=str(plain), duration=f"{STEPS} steps", log={"picture_every_steps": 0}))
    one, other = (SliceReader(folder / "checkpoints" / f"step_{STEPS:08d}") for folder in (run_dir, plain))
    for name in one.parameters:
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(one.whole(name, kind), other.whole(name, kind)), (name, kind)
    losses = {point["step"]: point["loss"] for point in read_metrics(plain)}
    for point in read_metrics(run_dir):
        assert point["loss"] == losses[point["step"]]


def test_points_are_where_they_are_due(recorded):
    run_dir, _ = recorded
    points = {point["step"]: point for point in read_metrics(run_dir)}
    assert list(points) == [1, 2, 3, 4, 6]  # the first, every second, held-out data at 3 and at the end
    assert [step for step, point in points.items() if "held_out_loss" in point] == [3, 6]
    assert points[6]["held_out_loss"] < points[3]["held_out_loss"]
    assert {"held_out_loss_by_source/seen", "held_out_loss_by_source/read"} <= set(points[3])


def test_a_point_accounts_for_its_step(recorded):
    run_dir, stdout = recorded
    first, *_, last = read_metrics(run_dir)
    for point in (first, last):
        parts = [value for name, value in point.items() if name.startswith("time/") and name != "time/step_s"]
        assert sum(parts) == pytest.approx(point["time/step_s"])
    expected = {"data_wait", "exchange", "vision", "forward", "backward", "optimizer", "save", "held_out", "other"}
    assert {name[5:-2] for name in last if name.startswith("time/")} == expected | {"step"}
    assert last["tokens_seen"] == sum(value for name, value in last.items() if name.startswith("tokens_by_source/"))
    assert last["images_by_source/text"] == 0 < last["images_by_source/caption"] == last["images_seen"]
    assert last["data/tiles_per_rank_max"] >= last["data/tiles_per_rank_mean"] > 0
    assert 0 < last["data/visual_token_share"] < 1
    assert last["tflops_per_s_per_rank"] > 0
    assert sum(value for name, value in first.items() if name.startswith("start/")) > first["time/step_s"]
    assert "first step after" in stdout


def test_tensorboard_has_pictures_and_a_layout(recorded):
    run_dir, _ = recorded
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("packed example")] == [1, 5]
    assert events.PluginTagToContent("custom_scalars")
    assert [event.step for event in events.Scalars("held_out_loss")] == [3, 6]


def test_a_chosen_step_is_traced(recorded):
    run_dir, _ = recorded
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["step_00000002.pt.trace.json.gz"]
    with gzip.open(run_dir / "profile" / "step_00000002.pt.trace.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert {"aten::mm", "gloo:all_reduce", "data_wait", "forward", "backward", "optimizer"} <= names


@pytest.mark.slow
def test_the_held_out_loss_does_not_depend_on_the_ranks(work, recorded):
    """About half a minute: runs on 1 and 4 ranks."""
    found = []
    for ranks in (1, 4):
        run_dir = work / f"held-out-{ranks}"
        recipe = runs.make_recipe(
            work, run_dir=str(run_dir), duration="2 steps", engine__ranks=ranks, engine__precision="fp32",
            held_out={"sources": held_out(work), "every_steps": 1, "batches": 3},
        )  # fmt: skip
        runs.train(recipe)
        found.append([point["held_out_loss"] for point in read_metrics(run_dir)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model__train_tower": True}], ids=["frozen tower", "trained tower"])
def test_measuring_is_the_same_under_every_strategy(work, changes):
    """About a minute and a half each: six runs on two ranks. A step after the first measurement shows that
    it left no trace in the strategy's own state."""
    found = {}
    for strategy in ("zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload"):
        run_dir = work / f"held-out-{strategy}-{len(changes)}"
        recipe = runs.make_recipe(
            work, run_dir=str(run_dir), duration="3 steps", engine__precision="fp32", engine__ds_config=strategy,
            held_out={"sources": held_out(work), "every_steps": 1}, **changes,
        )  # fmt: skip
        runs.train(recipe)
        points = read_metrics(run_dir)
        found[strategy] = [point[name] for point in points for name in ("loss", "held_out_loss")]
        assert all(point["time/vision_s"] > 0 for point in points)
    for strategy, values in found.items():
        assert values == pytest.approx(found["zero3"], rel=1e-5), strategy


@pytest.mark.slow
def test_held_out_data_that_can_not_be_read_ends_the_run_on_all_ranks(work):
    """A quarter of a minute."""
    broken = work / "broken.tar"
    broken.write_bytes((work / "data" / "caption-0.tar").read_bytes()[:700])
    sources = [{"name": "b", "shards": str(broken), "schema": "caption", "weight": 1}]
    recipe = runs.make_recipe(work, run_dir=str(work / "broken-held-out"), duration="2 steps",
                              held_out={"sources": sources, "every_steps": 1})  # fmt: skip
    done = runs.train(recipe, check=1)
    assert "broken.tar" in done.stdout + done.stderr
