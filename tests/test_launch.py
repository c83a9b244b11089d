"""Starting ranks on this machine: who may, and that they don't outlive who did."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megablip import launch
from megablip.config import parse_config
from megablip.engine import topology
from megablip.engine.status import ATTEMPT, RunStatus
from megablip.errors import ConfigError
from megablip.launch import KeptProcess, Machines, RankGroup, claim, conclude, launcher_command, lives_here
from tests.minimal import RECIPE

REPOSITORY = Path(__file__).parents[1]
SLEEPER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
STARTER = f"""
import os, sys, time
from megablip.launch import KeptProcess
kept = KeptProcess([sys.executable, "-c", {SLEEPER!r} + "time.sleep(600)"], dict(os.environ))
while len(kept.members()) < 2:
    time.sleep(0.02)
print(*[process.pid for process in kept.members()], flush=True)
time.sleep(600)
"""


def gone(pids: list[int]) -> bool:
    """Within ten seconds."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kept_process_and_its_children_end_with_who_started_it(number):
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as starter:
        pids = list(map(int, starter.stdout.readline().split()))
        assert len(pids) == 2
        starter.send_signal(number)
    assert gone(pids)


def test_what_a_kept_process_leaves_behind_ends_too():
    kept = KeptProcess([sys.executable, "-c", SLEEPER], dict(os.environ))
    assert kept.process.wait() == 0
    [orphan] = kept.members()
    kept.close()
    assert gone([orphan.pid])


def test_what_a_rank_is_starting_is_no_rank():
    """Between fork and exec it has the rank's command line; counted as a rank that has ended since, it cost the run."""
    forking = "import os, time; os.fork(); time.sleep(600)"
    group = RankGroup()
    group._kept = KeptProcess([sys.executable, "-c", forking, "megablip.train"], dict(os.environ))
    try:
        while len(group._kept.members()) < 2:
            time.sleep(0.02)
        assert [rank.pid for rank in group._ranks()] == [group._kept.process.pid]
    finally:
        group._kept.close()


def config_of(run_dir: Path):
    return parse_config(RECIPE | {"run_dir": str(run_dir)}, where="")


def test_a_run_has_one_attempt_at_a_time(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    RunStatus(tmp_path).begin(ranks=1)
    RunStatus(tmp_path).update(pid=other.pid)
    with pytest.raises(ConfigError, match=f"another attempt is training this run: process {other.pid}"):
        claim(config_of(tmp_path), lives_here)
    other.kill()
    other.wait()
    claim(config_of(tmp_path), lives_here)
    [attempt] = RunStatus(tmp_path).attempts
    assert attempt["outcome"] == "failed"
    assert "who had started them is gone" in attempt["reason"]
    claim(config_of(tmp_path), lambda attempt: "somebody")  # has ended, so nobody is asked


@pytest.mark.parametrize(
    "changes",
    [{"host": "elsewhere"}, {"pid": None}, {"started": "2001-01-01T00:00:00+0000"}, {"started": "?"}, {"job": 3}],
)
def test_another_process_of_the_same_number_is_not_taken_for_it(tmp_path, changes):
    status = RunStatus(tmp_path)
    status.begin(ranks=1)
    status.update(**{"pid": os.getppid()} | changes)
    assert lives_here(status.current) == ""


@pytest.mark.parametrize(
    ("facts", "asked", "outcome", "reason"),
    [
        ({}, True, "stopped", "stopped before the ranks had started"),
        ({}, False, "failed", "the ranks did not start: code 1"),
        ({"first_step": 4}, False, "failed", "the ranks ended without a word: code 1"),
        ({"first_step": 4}, True, "failed", "the ranks ended without a word: code 1"),
    ],
)
def test_ranks_that_end_without_a_word(tmp_path, facts, asked, outcome, reason):
    status = RunStatus(tmp_path)
    status.begin(ranks=1)
    status.update(**facts)
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n')
    attempt = conclude(status, asked=asked, reason="code 1")
    assert (attempt["outcome"], attempt["reason"]) == (outcome, reason)
    assert attempt.get("last_step") == (6 if facts else None)


def test_what_the_ranks_said_themselves_stays(tmp_path):
    status = RunStatus(tmp_path)
    status.begin(ranks=1)
    status.end("stopped", last_step=3)
    assert conclude(status, asked=False, reason="?")["outcome"] == "stopped"


def test_the_command_of_each_of_several_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    machines = Machines({"n1": 4, "n2": 2}, 1, "10.0.0.1", 12345)
    command = launcher_command(tmp_path / "config.yaml", machines)
    assert "--node_rank=1" in command
    assert command[command.index("--master_addr") + 1] == "10.0.0.1"
    [world] = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
    world = json.loads(base64.urlsafe_b64decode(world))
    assert list(world.items()) == [("n1", [0, 1, 2, 3]), ("n2", ["4", "5"])]
    with pytest.raises(ConfigError, match="4 ranks need as many GPUs"):
        launcher_command(tmp_path / "config.yaml", Machines({"n1": 4, "n2": 2}, 0, "10.0.0.1", 12345))


def test_fewer_gpus_than_ranks_are_told_before_these_start(tmp_path, monkeypatch):
    """CUDA shows one rank a GPU that another has, or none, and each says so in its own way."""
    monkeypatch.setattr(topology, "_DEVICES", tmp_path)
    monkeypatch.setattr(topology, "_GPU_DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    machines = Machines.alone(2)
    launcher_command(tmp_path / "config.yaml", machines)  # on the CPU
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="2 ranks need as many GPUs, but there are only 1"):
        launcher_command(tmp_path / "config.yaml", machines)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher_command(tmp_path / "config.yaml", machines)
    monkeypatch.delenv("DS_ACCELERATOR")
    (tmp_path / "nvidia1").touch()
    launcher_command(tmp_path / "config.yaml", machines)


def test_ranks_know_nothing_of_a_torchrun_around_their_launcher(tmp_path, monkeypatch):
    """Its TORCHELASTIC_USE_AGENT_STORE says that rank 0 need not open the store, and nobody would."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    status = RunStatus(tmp_path)
    status.begin(ranks=1)
    environment = launch._environment(config_of(tmp_path), 1, status)
    assert not [name for name in environment if name.startswith("TORCHELASTIC_")]
    assert environment[ATTEMPT] == status.attempt


def test_memory_of_gpus_is_given_in_segments_that_grow(tmp_path, monkeypatch):
    """Profiles of clusters had said so, and `megablip train` on one machine had not."""
    status = RunStatus(tmp_path)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def given(on_gpu=True):
        monkeypatch.setattr(launch, "has_gpu", lambda: on_gpu)
        environment = launch._environment(config_of(tmp_path), 1, status)
        return {name: environment[name] for name in names if name in environment}

    assert given(on_gpu=False) == {}
    assert given() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in names:
        with monkeypatch.context() as changed:
            changed.setenv(name, "max_split_size_mb:512")
            assert given() == {name: "max_split_size_mb:512"}
