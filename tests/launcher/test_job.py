"""What stands in RUN/launch, and that a run has one job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.job import job_state, submit_job, write_job
from megablip.config import load_config
from megablip.errors import ConfigError
from tests.launcher.fake_slurm import FakeSlurm
from tests.minimal import RECIPE


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"batch": {"lanes": 16}, "run_dir": "runs/a run"}))
    (tmp_path / "cluster.yaml").write_text("{gpus_per_node: 4, time: '2:00:00', partition: gpu}")
    return path


def test_a_job_keeps_recipe_and_profile_of_its_time(recipe, tmp_path):
    script = write_job(recipe, ["seed=5"], "cluster.yaml", 2)
    assert script == tmp_path / "runs" / "a run" / "launch" / "job.sbatch"
    config = load_config(script.parent / "recipe.yaml")
    assert (config.seed, config.run_dir, config.engine.ranks) == (5, "runs/a run", 4)
    text = script.read_text()
    assert "#SBATCH --nodes=2\n" in text
    assert f"cd -- {tmp_path}\n" in text, "relative paths are seen from where it was submitted"
    assert text.endswith(f"-m launcher supervise '{tmp_path / 'runs' / 'a run'}'\n")
    assert (
        load_config(write_job(recipe, ["engine.ranks=2"], "cluster.yaml", 2).parent / "recipe.yaml").engine.ranks == 2
    )


@pytest.mark.parametrize(
    ("overrides", "nodes", "error"),
    [(["engine.ranks=8"], 1, "8 ranks a node need as many GPUs"), ([], 5, "more than the 16 lanes")],
)
def test_what_can_not_run_is_refused_before_it_waits(recipe, overrides, nodes, error):
    with pytest.raises(ConfigError, match=error):
        write_job(recipe, overrides, "cluster.yaml", nodes)


def test_a_run_has_one_job_at_a_time(recipe, tmp_path, monkeypatch):
    slurm = FakeSlurm(tmp_path / "slurm", tmp_path, {})
    (slurm.bin / "sbatch").write_text("#!/bin/sh\necho 12\n")
    (slurm.bin / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    script = write_job(recipe, [], "cluster.yaml", 1)
    assert job_state(script.parent.parent) == ""
    assert submit_job(script) == 12
    slurm.set(jobs={"12": "PENDING"})
    assert job_state(script.parent.parent) == "job 12 is PENDING"
    with pytest.raises(ConfigError, match="the run has a job already: job 12 is PENDING"):
        submit_job(script)
    for jobs in ({"12": "COMPLETED"}, {}):
        slurm.set(jobs=jobs)
        assert submit_job(script) == 12


def test_the_batch_step_needs_neither_torch_nor_deepspeed():
    """Where ranks run in a container it has an interpreter of its own, on the node."""
    script = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'deepspeed'])\n"
        "import launcher.__main__, launcher.job, launcher.node, launcher.status"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
