"""Signals to `megablip train`, the deepspeed launcher between it and the ranks.

MEGABLIP_SIGNALS sets how many the chain makes (50; 10 to 25 s each): each resume is the next victim.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from megablip.checkpoint.commit import committed, open_checkpoint
from megablip.checkpoint.slices import SliceReader
from megablip.metrics.points import read_metrics
from megablip.records import MASTER, MOMENTS
from tests.distributed import runs

pytestmark = pytest.mark.slow
STEPS = 40
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Attempt:
    """One start of a recipe, and what it leaves."""

    def __init__(self, recipe: Path, run_dir: Path, *overrides: str):
        self.run_dir, self.before = run_dir, last_step(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._output = (run_dir / "output.txt").open("a")
        command = [sys.executable, "-m", "megablip.cli", "train", str(recipe), *overrides]
        self.process = subprocess.Popen(
            command, cwd=runs.REPOSITORY, env=runs.environment(), stdout=self._output, stderr=subprocess.STDOUT
        )

    def wait_for_step(self, step: int) -> None:
        """Until a step of the run is logged, or the run has ended."""
        deadline = time.monotonic() + 120
        while self.process.poll() is None and last_logged(self.run_dir) < step:
            assert time.monotonic() < deadline, (self.run_dir / "output.txt").read_text()[-3000:]
            time.sleep(0.005)

    def end(self) -> int:
        code = self.process.wait(120)
        self._output.close()
        return code


def last_step(run_dir: Path) -> int:
    """Of the newest committed checkpoint."""
    folders = committed(run_dir / "checkpoints")
    return int(folders[-1].name.removeprefix("step_")) if folders else 0


def last_logged(run_dir: Path) -> int:
    return max((point["step"] for point in read_metrics(run_dir)), default=0)


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    reader = SliceReader(run_dir / "checkpoints" / f"step_{step:08d}")
    return {f"{name}|{kind}": reader.whole(name, kind) for name in reader.parameters for kind in (MASTER, *MOMENTS)}


def assert_right(attempt: Attempt, code: int) -> None:
    """The exit code, the outcome and the newest checkpoint belong together."""
    run_dir, step = attempt.run_dir, last_step(attempt.run_dir)
    text = (run_dir / "output.txt").read_text()[-3000:]
    assert code in (0, 75), text
    # Before the launcher exists nothing has begun, so nothing is noted.
    if (run_dir / "status.json").exists():
        newest = json.loads((run_dir / "status.json").read_text())["attempts"][-1]
        assert newest["outcome"] in ("finished" if code == 0 else "stopped", "stopped"), text
        assert newest.get("last_step", step) == step
    assert (step == STEPS) == (code == 0) or step == STEPS
    if step > attempt.before:
        open_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
        assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{step:08d}"
        assert last_logged(run_dir) == step, "the checkpoint is of the step edge where the run stopped"
    assert not list((run_dir / "checkpoints").glob("*.tmp")), "no save is left unfinished"


def test_signals_at_random_moments_stop_at_a_step_edge_and_the_run_goes_on_exactly(work):
    signals = int(os.environ.get("MEGABLIP_SIGNALS", "50"))
    seed = int(os.environ.get("MEGABLIP_SEED", time.time_ns() % 10**6))
    rng = random.Random(seed)
    print(f"MEGABLIP_SEED={seed}")

    def recipe(run_dir: Path) -> Path:
        return runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps", checkpoint__every_steps=3)

    straight = work / "unsignalled"
    runs.train(recipe(straight))
    expected, expected_losses = state(straight, STEPS), runs.losses(straight)
    sent, number, moments = 0, 0, Counter()
    while sent < signals:
        run_dir = work / f"signalled-{number}"
        number += 1
        path = recipe(run_dir)
        while last_step(run_dir) < STEPS:
            moment = rng.choices(["start", "step", "last save"], [2, 6, 2])[0] if sent < signals else "none"
            before = last_step(run_dir)
            stop_at = before + rng.randint(1, 4)
            overrides = [f"stop_after_steps={stop_at}"] if moment == "last save" and stop_at < STEPS else []
            attempt = Attempt(path, run_dir, *overrides)
            if moment == "start":
                time.sleep(rng.uniform(0.5, 12))
            elif moment == "step":
                attempt.wait_for_step(before + rng.randint(1, 5))
                time.sleep(rng.uniform(0, 0.3))
            elif moment == "last save":
                attempt.wait_for_step(stop_at)
                time.sleep(rng.uniform(0, 0.1))
            if moment != "none" and attempt.process.poll() is None:
                attempt.process.send_signal(rng.choice(SIGNALS))
                sent += 1
                moments[moment] += 1
            assert_right(attempt, attempt.end())
        assert runs.losses(run_dir) == expected_losses, "every step bit for bit"
        found = state(run_dir, STEPS)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    print(f"{sent} signals ({dict(moments)}) in {number} runs of {STEPS} steps")


def test_a_second_signal_leaves_at_once_and_the_next_start_goes_on(work):
    """40 s."""
    run_dir = work / "twice"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration="100000 steps", checkpoint__every_steps=2)
    attempt = Attempt(recipe, run_dir)
    attempt.wait_for_step(5)
    for _ in range(2):
        attempt.process.send_signal(signal.SIGTERM)
    assert attempt.end() in (1, 75)
    outcome = json.loads((run_dir / "status.json").read_text())["attempts"][-1]
    if outcome["outcome"] == "failed":
        assert "at a second signal" in outcome["reason"]
    before = last_step(run_dir)
    assert before >= 2
    runs.train(recipe, f"stop_after_steps={before + 2}", check=75)
    assert last_step(run_dir) == before + 2


def test_a_signal_before_the_launcher_is_there_is_a_stop(tmp_path, work):
    recipe = runs.make_recipe(work, run_dir=str(tmp_path / "run"))
    script = (
        "import os, signal, sys; from pathlib import Path; from megablip import launch\n"
        "launch.index_sources = lambda data: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.exit(launch.launch(Path(sys.argv[1]), []))"
    )
    done = runs.run_python("-c", script, str(recipe), check=75)
    assert "stopped before the ranks had started" in done.stdout
