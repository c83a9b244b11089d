"""The whole path on real ranks: `megablip train` with the deepspeed launcher, ZeRO-3, bf16."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megablip.checkpoint.slices import SliceReader
from tests.distributed import runs
from tests.distributed.ranks import run_ranks

STEPS = 12


@pytest.fixture(scope="module")
def straight(work) -> Path:
    """A run of 12 steps without interruption."""
    run_dir = work / "straight"
    runs.train(runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps"))
    return run_dir


def masters(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    reader = SliceReader(run_dir / "checkpoints" / f"step_{step:08d}")
    return {name: reader.whole(name) for name in reader.parameters}


def assert_same_run(one: Path, other: Path) -> None:
    assert runs.losses(one) == runs.losses(other)
    for name, value in masters(one, STEPS).items():
        assert torch.equal(value, masters(other, STEPS)[name]), name


def test_loss_falls_and_the_outcome_is_written(straight):
    found = runs.losses(straight)
    assert len(found) == STEPS
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert runs.outcome(straight) == "finished"
    assert list((straight / "tensorboard").glob("events.*"))


def test_stopped_and_resumed_equals_straight_bit_for_bit(work, straight):
    run_dir = work / "resumed"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps")
    runs.train(recipe, "stop_after_steps=5", check=75)
    assert runs.outcome(run_dir) == "stopped"
    assert len(runs.losses(run_dir)) == 5
    runs.train(recipe)
    assert_same_run(run_dir, straight)


def test_sigterm_saves_and_the_next_start_goes_on(work, straight):
    run_dir = work / "signalled"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps", checkpoint__every_steps=1)
    command = [sys.executable, "-m", "megablip.cli", "train", str(recipe)]
    process = subprocess.Popen(command, cwd=runs.REPOSITORY, env=runs.environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/step_*/COMMITTED")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert runs.outcome(run_dir) == "stopped"
    assert len(runs.losses(run_dir)) < STEPS
    runs.train(recipe)
    assert_same_run(run_dir, straight)


def test_a_killed_run_goes_on_from_the_newest_checkpoint(work, straight):
    run_dir = work / "killed"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps", checkpoint__every_steps=4)
    runs.train(recipe, "stop_after_steps=6", check=75)
    # What kill -9 leaves: the newest checkpoint half written, a line of metrics cut off.
    newest = run_dir / "checkpoints" / "step_00000006"
    (newest / "COMMITTED").unlink()
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    done = runs.train(recipe)
    assert "resumed from step_00000004" in done.stdout
    assert_same_run(run_dir, straight)


def test_the_split_into_ranks_and_micro_batches_does_not_change_training(work):
    """Also with ranks whose sequence holds no image: most documents here are text alone."""
    found = []
    for ranks, sequences in ((1, 4), (2, 1)):
        run_dir = work / f"split-{ranks}"
        recipe = runs.make_recipe(
            work,
            run_dir=str(run_dir),
            engine__ranks=ranks,
            engine__precision="fp32",
            batch__micro_batch_sequences=sequences,
            data__mixture_unit="documents",
            data__max_tiles=3,
        )
        runs.train(recipe, "data.sources.1.weight=8")
        found.append(run_dir)
    assert runs.losses(found[0]) == pytest.approx(runs.losses(found[1]), rel=1e-5)
    for name, value in masters(found[0], 6).items():
        torch.testing.assert_close(value, masters(found[1], 6)[name], rtol=2e-3, atol=2e-4)


def test_text_alone_trains(work):
    run_dir = work / "text"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration="2 steps")
    text = json.dumps([{"name": "text", "shards": str(work / "data" / "text-*.tar"), "schema": "text", "weight": 1}])
    runs.train(recipe, f"data.sources={text}")
    start = SliceReader(run_dir / "checkpoints" / "step_00000002")
    for name in start.parameters:
        if name.startswith("sampler."):
            assert not start.whole(name, "exp_avg_sq").any(), f"{name} had a gradient from a tile that no one sees"


def test_export_equals_the_trained_weights_and_generates_the_same(work, straight):
    export = work / "export"
    runs.run_python("-m", "megablip.cli", "convert", "zero-to-hf", str(straight), str(export), "--dtype", "bf16")
    found = run_ranks(2, "tests.distributed.generation:compare", str(straight), str(export))
    for rank in found:
        assert rank["weights_equal"] > 20
        assert rank["trainer"] == rank["export"]
        assert all(rank["trainer"])


def test_another_base_model_is_refused(work, straight, tmp_path):
    weights = work / "start" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        done = runs.train(straight / "config.yaml", check=1)
        assert "the model is not the one this run began with" in done.stderr
        assert str(work / "start") in done.stderr
    finally:
        weights.write_bytes(content)
