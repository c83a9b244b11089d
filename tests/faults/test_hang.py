"""Runs that hang end by themselves, with the stacks of all threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.faults.ranks import FaultyRun

pytestmark = pytest.mark.slow
LIMIT_S = 6
NEVER = "100000 steps"


def test_a_stopped_rank_ends_the_others_within_the_limit_and_the_launcher_kills_it(work):
    """SIGSTOP through `megablip train`, the deepspeed launcher between; 60 s."""
    for victim in (0, 1):
        run_dir = work / f"stopped-{victim}"
        recipe = runs.make_recipe(
            work, run_dir=str(run_dir), duration=NEVER, health__step_limit_s=LIMIT_S, health__data_limit_s=LIMIT_S
        )
        command = [sys.executable, "-m", "megablip.cli", "train", str(recipe)]
        with (work / f"stopped-{victim}.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=runs.REPOSITORY, env=runs.environment(), stderr=output, stdout=output
            )
        try:
            _stop_one(run_dir, process, victim)
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()


def test_a_wait_for_data_that_takes_too_long_dumps_the_stacks_of_all_ranks(work):
    """30 s."""
    recipe = runs.make_recipe(work, run_dir=str(work / "data-hang"), duration=NEVER, health__data_limit_s=LIMIT_S)
    ended = FaultyRun("slow_data", recipe).end()
    for rank, end in enumerate(ended):
        assert end.code == 1
        assert "HangError: the run hangs: 'data' takes longer than its limit of 6 s" in end.output
        assert "rank 1, step 2" in end.output
        assert (work / "data-hang" / "stacks" / f"rank_{rank}.txt").stat().st_size > 500
    assert "in patched" in (work / "data-hang" / "stacks" / "rank_1.txt").read_text()


def test_a_slow_rank_is_named(work):
    """25 s; its frozen tower takes 0.1 s longer a micro-batch."""
    recipe = runs.make_recipe(work, run_dir=str(work / "slow"), duration="12 steps", health__straggler_every_steps=5)
    ended = FaultyRun("slow_tower", recipe).end()
    assert ended[0].code == 0
    assert f"slow in compute: rank 1 on {os.uname().nodename}" in ended[0].output
    assert "rank 0 on" not in ended[0].output


def _stop_one(run_dir: Path, process: subprocess.Popen, victim: int) -> None:
    _wait(lambda: len(read_metrics(run_dir)) > 5)
    ranks = {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[-2:-1] == ["megablip.train"] and "RANK" in child.environ()
    }
    ranks[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    other = 1 - victim
    assert not psutil.wait_procs([ranks[other]], timeout=LIMIT_S + 20)[1]
    assert time.monotonic() - began < LIMIT_S + 10
    assert process.wait(60) == 1
    assert not ranks[victim].is_running() or ranks[victim].status() == psutil.STATUS_ZOMBIE
    text = (run_dir / "stacks" / f"rank_{other}.txt").read_text()
    assert "takes longer than its limit" in text
    assert "megablip/train.py" in text
    [attempt] = json.loads((run_dir / "status.json").read_text())["attempts"]
    assert attempt["outcome"] == "failed"
    assert "HangError" in attempt["reason"]


def _wait(condition, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
