"""Runs that `python -m launcher slurm` has submitted, and what becomes of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megablip.metrics.points import last_step
from tests.distributed import runs
from tests.slurm.cluster import Cluster, Job, wait_until

START_S = 400  # for the first step of an attempt, on a very busy machine


def write_profile(folder: Path, **changes: Any) -> Path:
    """The profile of the test's own cluster: one rank a node, no GPU."""
    profile = {
        "gpus_per_node": 0, "ranks_per_node": 1, "time": "60:00", "signal_lead_s": 120, "exclusive": True,
        "environment": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(runs.REPOSITORY)},
    }  # fmt: skip
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(profile | changes))
    return path


def launcher(cluster: Cluster, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=runs.REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert check is None or done.returncode == check, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Submitted:
    """A job that trains a recipe into a run directory."""

    job: Job
    run_dir: Path

    @classmethod
    def start(cls, cluster: Cluster, recipe: Path, *overrides: str, nodes: int = 2, **profile: Any) -> Submitted:
        run_dir = Path(yaml.safe_load(recipe.read_text())["run_dir"])
        run_dir.mkdir(exist_ok=True)
        options = [f"--nodes={nodes}", f"--profile={write_profile(run_dir, **profile)}", "--submit"]
        done = launcher(cluster, "slurm", str(recipe), *overrides, *options)
        return cls(Job(cluster, int(re.search(r"job (\d+)", done.stdout)[1])), run_dir)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        try:
            return json.loads((self.run_dir / "status.json").read_text())["attempts"]
        except FileNotFoundError:
            return []

    def wait_for_step(self, step: int, timeout_s: float = START_S) -> None:
        """Until a step of the run is logged."""
        wait_until(
            lambda: last_step(self.run_dir) >= step or self.job.has_ended, f"step {step}", timeout_s, self.describe
        )
        assert last_step(self.run_dir) >= step, self.describe()

    def wait_for_attempt(self, number: int, steps: int = 3, timeout_s: float = START_S) -> dict[str, Any]:
        """Until an attempt, counted from 1, has trained so many steps; it."""

        def trains() -> bool:
            attempt = dict(enumerate(self.attempts, 1)).get(number, {})
            return "first_step" in attempt and last_step(self.run_dir) >= attempt["first_step"] + steps

        wait_until(lambda: trains() or self.job.has_ended, f"attempt {number}", timeout_s, self.describe)
        assert trains(), self.describe()
        return self.attempts[number - 1]

    @property
    def log(self) -> str:
        """What all starts of the job have printed."""
        return Path(self.job.show()["StdOut"]).read_text()

    def describe(self) -> str:
        return f"{json.dumps(self.attempts, indent=1)}\n{self.job.describe()}"
