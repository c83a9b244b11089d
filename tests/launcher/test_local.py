"""`python -m launcher local` with real ranks: whatever is killed, the run ends as one that nothing has interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megablip.engine.status import RunStatus
from megablip.metrics.points import last_step
from tests.distributed import runs

pytestmark = pytest.mark.slow
STEPS = 100


class Supervised:
    """A supervised run; its processes by what they are."""

    def __init__(self, recipe: Path, run_dir: Path, *overrides: str):
        self.run_dir = run_dir
        run_dir.mkdir(exist_ok=True)
        self._output = (run_dir / "output.txt").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "local", str(recipe), *overrides],
            cwd=runs.REPOSITORY, env=runs.environment(), stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def find(self, *words: str) -> list[psutil.Process]:
        """Processes with these words in their command line, below the supervisor or not."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if str(self.run_dir / "config.yaml") in command and all(word in command for word in words):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [
            process for process in self.find("megablip.train") if "deepspeed.launcher.launch" not in process.cmdline()
        ]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < deadline, f"no {what}: {self.output()[-3000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: last_step(self.run_dir) >= step or self.process.poll() is not None, f"step {step}")

    def wait_for_attempt(self, number: int, steps: int) -> None:
        """Until the attempt, counted from 1, has trained so many steps."""

        def trains() -> bool:
            attempt = dict(enumerate(self.attempts(), 1)).get(number, {})
            return "first_step" in attempt and last_step(self.run_dir) >= attempt["first_step"] + steps

        self.wait_until(trains, f"steps of attempt {number}")

    def attempts(self) -> list[dict]:
        return RunStatus(self.run_dir).attempts

    def output(self) -> str:
        return (self.run_dir / "output.txt").read_text()


def recipe_of(work: Path, run_dir: Path) -> Path:
    run_dir.mkdir(exist_ok=True)
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration=f"{STEPS} steps", checkpoint__every_steps=4)
    return recipe.rename(run_dir / "recipe.yaml")


@pytest.fixture(scope="module")
def straight(work) -> list[float]:
    recipe = recipe_of(work, work / "straight-local")
    runs.train(recipe)
    return runs.losses(work / "straight-local")


def test_a_killed_rank_launcher_or_node_costs_an_attempt_each(work, straight):
    """Four minutes, with the run that is compared with."""
    run = Supervised(recipe_of(work, work / "killed"), work / "killed")
    victims = [
        run.ranks,
        lambda: run.find("deepspeed.launcher.launch"),
        lambda: run.find("launcher", "node"),
    ]
    for number, find in enumerate(victims, 1):
        run.wait_for_attempt(number, steps=4 * number)  # failures at the same step would end it
        before = {process.pid for process in run.find()}
        find()[-1].kill()
        run.wait_until(lambda number=number: len(run.attempts()) > number, "new attempt")
        assert not before & {process.pid for process in run.find()}, f"some are left of {run.attempts()}"
    assert run.process.wait(180) == 0, run.output()[-3000:]
    assert [attempt["outcome"] for attempt in run.attempts()] == ["failed"] * 3 + ["finished"]
    for attempt, following in zip(run.attempts(), run.attempts()[1:], strict=False):
        assert attempt["first_step"] <= following["first_step"] <= attempt["last_step"]
        assert "ended without a word" in attempt["reason"] or attempt["reason"].startswith("rank ")
    assert runs.losses(work / "killed") == straight
    assert not run.find()


def test_a_killed_supervisor_takes_all_with_it_and_the_next_start_goes_on(work, straight):
    """One minute."""
    run_dir = work / "orphaned"
    recipe = recipe_of(work, run_dir)
    run = Supervised(recipe, run_dir)
    run.wait_for_step(6)
    run.process.kill()
    run.process.wait()
    run.wait_until(lambda: not run.find(), "end of the ranks")
    again = Supervised(recipe, run_dir)
    again.wait_until(lambda: len(again.attempts()) == 2, "new attempt")
    assert "who had started them is gone" in again.attempts()[0]["reason"]
    again.wait_for_step(20)
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(120) == 75
    assert "start it again to go on" in again.output()
    stopped = again.attempts()[-1]
    assert (stopped["outcome"], stopped["last_step"]) == ("stopped", last_step(run_dir))
    assert runs.losses(run_dir) == straight[: stopped["last_step"]]
    assert not run.find()


def test_a_failure_at_the_same_step_is_not_tried_a_third_time(work, tmp_path):
    """Half a minute: an interpreter that does not start the ranks."""
    run_dir = tmp_path / "run"
    recipe = recipe_of(work, run_dir)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-m' and any('megablip.train' in word for word in sys.orig_argv) "
        "and not any('deepspeed' in word for word in sys.orig_argv):\n"
        "    raise SystemExit('this interpreter is broken')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "local", str(recipe)],
        cwd=runs.REPOSITORY, env=runs.environment() | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    attempts = json.loads((run_dir / "status.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["failed", "failed"]
    assert "the run failed twice before its first step; it is not started once more" in done.stdout
