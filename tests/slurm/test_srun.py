"""Bare srun on two nodes, without a launcher."""

from __future__ import annotations

import shlex
import sys

from megablip.config import load_config
from megablip.data.samples import index_sources
from megablip.launch import prepare_run
from tests.distributed import runs


def test_zero3_over_both_nodes_has_the_losses_of_one_machine(cluster, work, straight):
    config = load_config(straight.recipe("srun", "10 steps"))
    path = prepare_run(config)
    index_sources(config.data)
    command = shlex.join(["srun", "--label", sys.executable, "-m", "megablip.train", str(path)])
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", f"--output={work}/srun.txt", f"--chdir={runs.REPOSITORY}", "--wrap", command
    )
    assert job.wait() == "COMPLETED", job.describe()
    assert runs.losses(work / "srun") == straight.losses(10)
