"""One resolver: SLURM's variables, torchrun's, or a hostfile."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import nodes as module
from launcher.nodes import all_machines, find_machines, named_machines, read_hostfile
from megablip.engine.topology import hosts_of
from megablip.errors import ConfigError
from megablip.launch import Machines
from tests.distributed import runs

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}  # fmt: skip
TORCHRUN = {
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29400",
}  # fmt: skip


def test_slurm():
    slots = {"gpu08": 4, "gpu09": 4, "gpu10": 4}
    assert find_machines(STEP, 4) == Machines(slots, 1, "gpu08", 14711)


def test_the_supervisors_choice(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    found = named_machines(["n1", "n3"], 4, ("10.0.0.8", 12345))
    assert found == Machines({"n1": 4, "n3": 4}, 1, "10.0.0.8", 12345)
    with pytest.raises(ConfigError, match="this machine, n3, is not among those of the attempt: n1, n2"):
        named_machines(["n1", "n2"], 4, ("10.0.0.8", 12345))


def test_several_tasks_on_a_node_are_refused():
    with pytest.raises(ConfigError, match=r"srun starts 2\(x3\) tasks a node") as caught:
        find_machines(STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, 4)
    assert "--ntasks-per-node=1" in caught.value.remedy
    with pytest.raises(ConfigError, match="torchrun starts 8 processes here"):
        find_machines(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, 8)


def test_torchrun_wins_over_the_slurm_that_it_runs_in_and_its_own_port_is_left_to_it():
    assert find_machines(STEP | TORCHRUN, 2) == Machines({"node 0": 2, "node 1": 2}, 1, "gpu7", 29401)


def test_alone_without_any_of_them():
    found = find_machines({}, 3)
    assert (found.slots, found.node_rank, found.master_address) == ({"localhost": 3}, 0, "127.0.0.1")


def test_a_hostfile(tmp_path, monkeypatch):
    path = tmp_path / "hosts"
    path.write_text("# ours\ngpu7.cluster slots=2\n\ngpu8 slots=4 # new\n")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu8.cluster")
    slots = {"gpu7.cluster": 2, "gpu8": 4}
    assert find_machines(STEP, 1, path) == Machines(slots, 1, "gpu7.cluster", 29500)
    assert find_machines({"MASTER_PORT": "7000"}, 1, path).master_port == 7000
    assert all_machines(1, path) == Machines(slots, 0, "gpu7.cluster", 29500)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu9")
    with pytest.raises(ConfigError, match="names this machine 0 times"):
        find_machines({}, 1, path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("gpu7\n", "'gpu7' is no host with its slots"),
        ("gpu7 slots=0", "is no host with its slots"),
        ("gpu7 slots=2 x", "is no host with its slots"),
        ("gpu7 slots=2\ngpu7 slots=2", "names a host twice"),
        ("# none\n", "names no host"),
        (None, "can't be read"),
    ],
)
def test_what_is_wrong_with_a_hostfile_is_said(tmp_path, text, error):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=error):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("gpu7", ["gpu7"]),
        ("gpu[08-10],login1", ["gpu08", "gpu09", "gpu10", "login1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("a[1,3-4]b[07-08]", ["a1b07", "a1b08", "a3b07", "a3b08", "a4b07", "a4b08"]),
        ("a[1-2]-ib,c", ["a1-ib", "a2-ib", "c"]),
    ],
)
def test_slurms_lists_of_nodes(nodes, hosts):
    assert hosts_of(nodes) == hosts


def test_what_would_be_started_inside_a_job(monkeypatch):
    monkeypatch.setattr(module.os, "environ", {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]"})
    assert all_machines(8) == Machines({"n1": 8, "n2": 8}, 0, "n1", 10012)


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "by hand"])
def test_two_nodes_on_one_machine_have_the_losses_of_one(work, tmp_path, starter):
    """40 s each: `launcher node` once for each node, under torchrun, or by hand with a hostfile."""
    straight = runs.make_recipe(work, run_dir=str(work / "one machine"), duration="4 steps")
    if not (work / "one machine" / "metrics.jsonl").exists():
        runs.train(straight)
    run_dir = tmp_path / "run"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration="4 steps", engine__ranks=1)
    done = runs.run_python("-m", "launcher", "print", str(recipe))
    assert "deepspeed.launcher.launch" in done.stdout
    node = ["-m", "launcher", "node", str(run_dir / "config.yaml")]
    environments: list[dict[str, str]] = [{}, {}]
    if starter == "torchrun":
        port = shlex.split(done.stdout)[shlex.split(done.stdout).index("--master_port") + 1]  # a free one
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--nnodes", "2"]
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "1", *meeting, *node]
    else:
        (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
        command = [*node, "--hostfile", str(tmp_path / "hosts")]
        environments = [{"SLURMD_NODENAME": name, "MASTER_ADDR": "127.0.0.1"} for name in ("n1", "n2")]
    processes = [
        subprocess.Popen(
            [sys.executable, *command], cwd=runs.REPOSITORY, env=os.environ | runs.environment() | environment
        )
        for environment in environments
    ]
    assert [process.wait(180) for process in processes] == [0, 0]
    assert runs.losses(run_dir) == runs.losses(Path(work / "one machine"))
