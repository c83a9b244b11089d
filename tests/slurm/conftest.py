"""One Slurm of two nodes for all tests of this folder.

MEGABLIP_SLURM_REQUIRED=1: where Slurm can't be had, fail instead of skipping.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.slurm.cluster import Cluster, Missing, install

STRAIGHT_STEPS = 400  # some 40 s
RECIPE = {"duration": "2000 steps", "checkpoint__every_steps": 10}


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
        with Cluster(folder, ["n1", "n2"]) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def cluster(session_cluster) -> Cluster:
    """The cluster with all its nodes idle; what a test before left behind is ended."""
    session_cluster.restore()
    return session_cluster


@dataclass(frozen=True)
class Straight:
    """A run on this machine, two ranks, that nothing has interrupted."""

    work: Path
    losses: list[float]
    data_digests: list[str]

    def recipe(self, run_dir: Path, **changes: Any) -> Path:
        """The same recipe for another run."""
        run_dir.mkdir(exist_ok=True)
        recipe = runs.make_recipe(self.work, run_dir=str(run_dir), **RECIPE | changes)
        return recipe.rename(run_dir / "recipe.yaml")


@pytest.fixture(scope="session")
def straight(work) -> Straight:
    recipe = Straight(work, [], []).recipe(work / "straight")
    runs.train(recipe, f"stop_after_steps={STRAIGHT_STEPS}", check=75)
    digests = [point["data_digest"] for point in read_metrics(work / "straight")]
    return Straight(work, runs.losses(work / "straight"), digests)
