"""What srun starts on a node: its exit code, and that its mistakes reach the run's status."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from launcher import node as module
from launcher.node import run_node
from megablip.config import load_config
from megablip.engine.status import ATTEMPT, RunStatus
from megablip.errors import ConfigError
from megablip.launch import Machines, RankGroup
from tests.minimal import RECIPE


@pytest.fixture
def config_path(tmp_path, monkeypatch) -> Path:
    """A prepared run; nothing of this process's environment tells of a launcher."""
    for name in (ATTEMPT, "SLURMD_NODENAME", "GROUP_RANK", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"run_dir": str(tmp_path), "engine": {"ranks": 3}}))
    return path


def play(monkeypatch, outcome: str, code: int) -> list[Machines]:
    """Ranks that end so, in the attempt that is there or in one of their own; with which machines."""
    seen = []

    def run(self, config, config_path, machines, status):
        seen.append(machines)
        if not status.attempt:
            RunStatus(status.run_dir).begin(ranks=3)
        status.end(outcome)
        return code

    monkeypatch.setattr(RankGroup, "run", run)
    return seen


def test_by_hand_the_outcome_counts_and_not_the_launchers_code(config_path, monkeypatch):
    machines = play(monkeypatch, "finished", 1)
    assert run_node(config_path) == 0
    assert [found.slots for found in machines] == [{"localhost": 3}]
    play(monkeypatch, "stopped", 0)
    assert run_node(config_path) == 75


def test_under_the_supervisor_the_launchers_code_tells_srun(config_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, RunStatus(config_path.parent).begin(ranks=3))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    machines = play(monkeypatch, "failed", 1)
    assert run_node(config_path, nodes=["n1", "n2"], meeting_place=("10.0.0.1", 12000)) == 1
    assert machines == [Machines({"n1": 3, "n2": 3}, 1, "10.0.0.1", 12000)]


def test_a_mistake_is_noted_with_the_node(config_path, monkeypatch):
    status = RunStatus(config_path.parent)
    monkeypatch.setenv(ATTEMPT, status.begin(ranks=3))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="3 ranks need as many GPUs"):
        run_node(config_path, nodes=["n1", "n2"], meeting_place=("10.0.0.1", 12000))
    assert status.current["outcome"] == "failed"
    assert status.current["reason"].startswith("node n2: 3 ranks need as many GPUs, but CUDA_VISIBLE_DEVICES leaves 1")


def test_a_signal_before_there_are_ranks_is_a_stop(config_path, monkeypatch):
    def load(path):
        os.kill(os.getpid(), signal.SIGUSR1)
        return load_config(path)

    monkeypatch.setattr(module, "load_config", load)
    assert run_node(config_path) == 75
