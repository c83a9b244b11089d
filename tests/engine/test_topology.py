"""How ranks find each other: variables of torchrun, the deepspeed launcher, bare srun, or none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megablip.engine import topology
from megablip.engine.topology import (
    _own_gpu,
    _ranks_per_node,
    computes_on_gpu,
    first_host,
    has_gpu,
    prepare_device,
    rendezvous,
)
from megablip.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
MEET = """
import json, sys, torch, torch.distributed as dist
from megablip.engine.topology import init_distributed
topology = init_distributed(timeout_s=60, threads=1)
total = torch.tensor([topology.rank + 1])
dist.all_reduce(total)
print(f"rank {topology.rank} of {topology.world}, {topology.ranks_per_node} a node, sum {int(total)}", flush=True)
topology.leave()
"""


def clean_environment() -> dict[str, str]:
    ours = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("login1,gpu[003-007,9]", "login1"),
        ("a[1,3-4]b[07-08],c2", "a1b07"),
        ("node-1.cluster,node-2.cluster", "node-1.cluster"),
    ],
)
def test_the_first_node_is_found_in_a_list(nodes, first):
    assert first_host(nodes) == first


def test_slurm_gives_rank_world_and_meeting_place():
    task = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[11-12]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
    }  # fmt: skip
    found = rendezvous(task)
    assert found == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu11", "MASTER_PORT": "14711",
    }  # fmt: skip
    ports = {rendezvous(task | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(8)}
    assert len(ports) == 8
    assert all(10000 <= int(port) < 30000 for port in ports)
    del task["SLURM_STEP_NODELIST"]
    assert rendezvous(task)["MASTER_ADDR"] == "10.0.0.1"


def test_alone_without_any_variable():
    assert rendezvous({}) == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "expected"), [("aabb", 2), ("aaaa", 4), ("ab", 1), ("aaab", 1), ("abab", 1), ("a", 1)]
)
def test_ranks_per_node_are_those_side_by_side(hosts, expected):
    assert _ranks_per_node(list(hosts)) == expected


def test_two_tasks_of_bare_srun_meet():
    """As srun starts them: nothing of torch's is set, SLURM's names this node and a job."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            cwd=REPOSITORY,
            env=clean_environment()
            | {
                "SLURM_PROCID": str(task), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(task),
                "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1)
    ]  # fmt: skip
    for rank, process in enumerate(processes):
        out, errors = process.communicate(timeout=120)
        assert f"rank {rank} of 2, 2 a node, sum 3" in out, errors[-3000:]
        assert process.returncode == 0


@pytest.mark.slow
def test_two_ranks_of_torchrun_meet(tmp_path):
    """About 15 s. The deepspeed launcher starts the ranks in tests/distributed/test_training.py."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         str(script)],
        cwd=REPOSITORY, env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2, 2 a node, sum 3" in done.stdout


def test_a_rank_without_a_gpu_is_told():
    assert [_own_gpu(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]
    assert _own_gpu(3, 1) == 0
    with pytest.raises(ConfigError, match="it is number 4, from 0 on, of 4 GPUs"):
        _own_gpu(4, 4)


def test_a_hidden_gpu_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "_GPU_DEVICES", (str(tmp_path),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert has_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert has_gpu()
    monkeypatch.setattr(topology, "_GPU_DEVICES", (str(tmp_path / "none"),))
    assert not has_gpu()


def test_torch_and_deepspeed_choose_the_same_device(monkeypatch):
    """Where torch sees a GPU and DeepSpeed was told to use the CPU, the model once went to the GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for variable, on_gpu in ((None, True), ("cuda", True), ("cpu", False)):
        if variable is None:
            monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        else:
            monkeypatch.setenv("DS_ACCELERATOR", variable)
        assert computes_on_gpu() == on_gpu


def test_cudnns_attention_is_switched_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert prepare_device().type == ("cuda" if computes_on_gpu() else "cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
