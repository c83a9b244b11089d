"""One Slurm for all tests of this folder.

MEGABLIP_SLURM_REQUIRED=1: where Slurm can't be had, fail instead of skipping.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.slurm.cluster import Cluster, Missing, install

# Jobs run on two nodes; four are there for a preflight that finds one fault on each but the first.
PARTITIONS = {"two": ["n1", "n2"], "four": ["n1", "n2", "n3", "n4"]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    try:
        install()
    except Missing as missing:
        if os.environ.get("MEGABLIP_SLURM_REQUIRED") == "1":
            raise
        pytest.skip(str(missing))
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own is too long for a socket's path
    try:
        with Cluster(folder, PARTITIONS) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def cluster(session_cluster) -> Cluster:
    """The cluster with all its nodes idle; what a test before left behind is ended."""
    session_cluster.restore()
    return session_cluster


class Straight:
    """Runs on this machine, two ranks, that nothing has interrupted, as long as they are asked for.

    The learning rate is constant, so a recipe's duration is not seen in its losses.
    """

    every = 10
    """Steps between checkpoints."""

    def __init__(self, work: Path):
        self._work = work
        self._longest = 0

    def recipe(self, name: str, duration: str, **changes: Any) -> Path:
        """The recipe of a run in work/`name`."""
        run_dir = self._work / name
        run_dir.mkdir(exist_ok=True)
        recipe = runs.make_recipe(
            self._work, run_dir=str(run_dir), duration=duration, optimizer__schedule="constant",
            checkpoint__every_steps=self.every, **changes,
        )  # fmt: skip
        return recipe.rename(run_dir / "recipe.yaml")

    def run_dir(self, steps: int) -> Path:
        """A run of exactly that many steps."""
        run_dir = self._work / f"straight-{steps}"
        if not run_dir.exists():
            runs.train(self.recipe(run_dir.name, f"{steps} steps"))
            self._longest = max(self._longest, steps)
        return run_dir

    def points(self, steps: int) -> list[dict[str, Any]]:
        return read_metrics(self.run_dir(max(steps, self._longest)))[:steps]

    def losses(self, steps: int) -> list[float]:
        return [point["loss"] for point in self.points(steps)]


@pytest.fixture(scope="session")
def straight(work) -> Straight:
    return Straight(work)
