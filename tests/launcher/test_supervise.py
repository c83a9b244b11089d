"""What the supervisor does with what it finds: retries, budgets, signals, lost nodes, requeues."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import allocation
from launcher import supervise as module
from launcher.allocation import SlurmJob
from launcher.profile import ClusterProfile
from launcher.supervise import NO_NODE, Supervisor
from launcher.verdict import Report
from megablip.config import parse_config
from megablip.doctor.finding import Finding
from megablip.engine.status import RunStatus
from megablip.errors import ConfigError
from tests.launcher.fake_slurm import FakeSlurm
from tests.minimal import RECIPE

DIED = {"first_step": 0, "code": 1}


class Scene:
    """A run whose ranks are played by a fake srun."""

    def __init__(self, folder: Path, monkeypatch, *plays: dict[str, Any], **changes: Any):
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.slurm = FakeSlurm(folder, self.run_dir, {"n1": "MIXED", "n2": "ALLOCATED"})
        self.slurm.set(plays=list(plays))
        monkeypatch.setenv("PATH", f"{self.slurm.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(module, "prepare", lambda config: self.run_dir / "config.yaml")
        monkeypatch.setattr(module, "PAUSE_S", 0)
        self.checked: list[list[str]] = []
        self.bad: dict[str, str] = {}
        monkeypatch.setattr(module, "preflight", self.preflight)
        self.config = parse_config(RECIPE | {"run_dir": str(self.run_dir)} | changes, where="")

    def run(self, job: int = 7, restarts: int = 0) -> int:
        self.slurm.set(restarts=restarts)
        profile = ClusterProfile(time="1:00:00", python="/bin/py")
        return Supervisor(self.config, SlurmJob(job, restarts, 2, profile), at_once=False).run()

    def preflight(self, config_path, nodes, meeting_place, step) -> Report:
        """Plays the checks; `bad` are the nodes that fail, with the reason; "" is a fault of none of them."""
        assert "--kill-on-bad-exit=0" in step(["-m", "launcher"])
        assert meeting_place[0] == "10.0.0.1"
        self.checked.append(nodes)
        wrong = [
            Finding("disk", reason, ok=False, node=node) for node, reason in self.bad.items() if node in ["", *nodes]
        ]
        return Report(nodes, wrong)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return RunStatus(self.run_dir).attempts

    def signal_when_started(self, *numbers: int) -> threading.Thread:
        def act() -> None:
            while not self.slurm.started.exists():
                time.sleep(0.01)
            for number in numbers:
                os.kill(os.getpid(), number)

        thread = threading.Thread(target=act)
        thread.start()
        return thread


@pytest.fixture
def scene(tmp_path, monkeypatch):
    return lambda *plays, **changes: Scene(tmp_path, monkeypatch, *plays, **changes)


def test_a_run_that_finishes_and_the_command_on_its_nodes(scene):
    play = scene({"outcome": "finished", "first_step": 0, "last_step": 100})
    assert play.run() == 0
    [attempt] = play.attempts
    assert attempt["nodes"] == ["n1", "n2"]
    assert (attempt["job"], attempt["restarts"], attempt["ranks"]) == (7, 0, 2)
    [srun] = play.slurm.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n2"} <= set(srun)
    # 10.0.0.1: as Slurm reaches the first node; the port follows from the job's number.
    where = srun.index("/bin/py")
    assert srun[where:] == [
        "/bin/py", "-m", "launcher", "node", str(play.run_dir / "config.yaml"), "--nodes", "n1,n2", "--master",
        "10.0.0.1:10007",
    ]  # fmt: skip


def test_a_finished_run_that_is_started_again_ends_at_once(scene):
    play = scene({"outcome": "finished", "first_step": 0, "last_step": 100})
    play.run()
    folder = play.run_dir / "checkpoints" / "step_00000100"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").touch()
    assert play.run(restarts=1) == 0
    assert len(play.slurm.calls("srun")) == 1
    play.config = parse_config(RECIPE | {"run_dir": str(play.run_dir), "duration": "200 steps"}, where="")
    play.slurm.set(plays=[{"outcome": "finished", "last_step": 200}])
    play.run(restarts=2)
    assert len(play.slurm.calls("srun")) == 2, "there is more to train now"


def test_failures_at_other_steps_are_tried_again(scene):
    play = scene(
        {"outcome": "failed", "reason": "rank 1: first", "first_step": 0, "last_step": 5},
        DIED,
        {"outcome": "finished", "last_step": 100},
    )
    assert play.run() == 0
    assert [attempt["outcome"] for attempt in play.attempts] == ["failed", "failed", "finished"]
    assert play.attempts[1]["reason"] == "the ranks ended without a word: exit code 1"


@pytest.mark.parametrize(
    ("play", "where", "reason"),
    [
        (
            {"outcome": "failed", "reason": "rank 1: no\n  more", "last_step": 5},
            "after step 5",
            "rank 1: no\n        more",
        ),
        ({"code": 1}, "before its first step", "the ranks did not start: exit code 1"),
    ],
)
def test_two_failures_at_the_same_step_end_it_with_the_reasons(scene, capsys, play, where, reason):
    stage = scene(play, play)
    assert stage.run() == 1
    diagnosis = capsys.readouterr().out.partition(f"the run failed twice {where}; it is not started once more")[2]
    assert diagnosis.count(f"      {reason}\n") == 2
    assert "to do: mend what the reasons name" in diagnosis
    assert not stage.slurm.calls("scontrol")


def test_failures_of_an_earlier_job_do_not_count(scene):
    fails = {"outcome": "failed", "reason": "rank 1: no", "last_step": 5}
    play = scene(fails, fails)
    play.run()
    play.slurm.set(plays=[fails, {"outcome": "finished"}], jobs={"8": "RUNNING"})
    assert play.run(job=8) == 0
    play.slurm.set(plays=[fails, fails, fails], jobs={"8": "RUNNING"})
    assert play.run(job=8, restarts=1) == 1
    assert len(play.attempts) == 6


def test_the_budget_of_an_hour(scene, capsys):
    plays = [{"outcome": "failed", "reason": f"rank {n}: no", "last_step": n} for n in range(9)]
    play = scene(*plays, health={"restarts_per_hour": 3})
    assert play.run() == 1
    assert len(play.attempts) == 4
    told = capsys.readouterr().out
    assert "failed 4 times within an hour" in told
    assert "rank 3: no" in told


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_job_requeued(scene, number):
    play = scene({"wait": True, "outcome": "stopped", "first_step": 0, "last_step": 9})
    thread = play.signal_when_started(number, number)
    assert play.run() == 75
    thread.join()
    assert play.slurm.calls("scontrol") == [["requeue", "7"]]
    assert [attempt["outcome"] for attempt in play.attempts] == ["stopped"]


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING", "COMPLETING"])
def test_a_job_that_its_user_ends_or_requeues_is_left_so(scene, capsys, state):
    play = scene(
        {"wait": True, "outcome": "stopped", "last_step": 9, "then": {"jobs": {"7": state}}},
    )
    thread = play.signal_when_started(signal.SIGTERM)
    assert play.run() == 75
    thread.join()
    assert not play.slurm.calls("scontrol")
    assert f"Slurm has the job as {state}" in capsys.readouterr().out


def test_a_stop_that_somebody_else_asked_for_is_requeued_but_not_one_of_the_recipe(scene):
    play = scene({"outcome": "stopped", "first_step": 0, "last_step": 9})
    assert play.run() == 75
    assert play.slurm.calls("scontrol") == [["requeue", "7"]]
    play.config = parse_config(RECIPE | {"run_dir": str(play.run_dir), "stop_after_steps": 12}, where="")
    play.slurm.set(plays=[{"outcome": "stopped", "first_step": 9, "last_step": 12}])
    assert play.run(restarts=1) == 75
    assert len(play.slurm.calls("scontrol")) == 1


def test_a_requeue_that_is_refused_is_told(scene, capsys):
    play = scene({"outcome": "stopped", "first_step": 0, "last_step": 9})
    play.slurm.set(refuse=["requeue"])
    assert play.run() == 75
    assert "submit it again to go on" in capsys.readouterr().out


def test_stops_without_a_step_are_not_repeated_for_ever(scene, capsys):
    idle = {"outcome": "stopped", "first_step": 4, "last_step": 4}
    play = scene(*[idle] * 9)
    codes = [play.run(restarts=restarts) for restarts in range(5)]
    assert codes == [75, 75, 75, 75, 1]
    assert "stopped 5 times without a single step" in capsys.readouterr().out


def test_a_signal_while_nothing_runs_yet(scene, monkeypatch, capsys):
    play = scene()
    monkeypatch.setattr(module, "prepare", lambda config: os.kill(os.getpid(), signal.SIGUSR1))
    assert play.run() == 75
    assert play.attempts == []
    assert play.slurm.calls("scontrol") == [["requeue", "7"]]
    assert "stopped while no rank was there" in capsys.readouterr().out


def test_ranks_that_die_of_the_signal_before_they_exist_are_stopped(scene):
    play = scene({"wait": True, "code": 138})
    thread = play.signal_when_started(signal.SIGUSR1)
    assert play.run() == 75
    thread.join()
    assert (play.attempts[0]["outcome"], play.attempts[0]["reason"]) == (
        "stopped",
        "stopped before the ranks had started",
    )


def test_a_lost_node_is_left_out_and_the_requeued_job_excludes_it(scene, capsys):
    lost = DIED | {"then": {"nodes": {"n1": "ALLOCATED", "n2": "DOWN*"}}}
    play = scene(lost, {"outcome": "stopped", "first_step": 0, "last_step": 9})
    assert play.run() == 75
    assert [attempt["nodes"] for attempt in play.attempts] == [["n1", "n2"], ["n1"]]
    assert play.attempts[0]["lost"] == ["n2"]
    assert play.attempts[1]["ranks"] == 1
    assert "n2 is left out: Slurm says DOWN*" in capsys.readouterr().out
    assert play.slurm.calls("scontrol") == [
        ["requeue", "7"],
        ["update", "JobId=7", "ExcNodeList=n[8-9],n2", "NumNodes=1-2"],
    ]


def test_nodes_that_were_lost_do_not_make_a_repeated_failure(scene):
    one, other = {"nodes": {"n1": "IDLE", "n2": "DOWN"}}, {"nodelist": "n1"}
    play = scene(DIED | {"then": one}, DIED | {"then": other}, {"outcome": "finished"})
    assert play.run() == 0
    assert len(play.attempts) == 3


def test_a_node_that_fails_its_checks_is_left_out(scene, capsys):
    play = scene({"outcome": "stopped", "first_step": 0, "last_step": 9})
    play.bad = {"n1": "read-only"}
    assert play.run() == 75
    assert play.checked == [["n1", "n2"], ["n2"]]
    assert play.attempts[0]["nodes"] == ["n2"]
    assert "n1 is left out: disk: read-only" in capsys.readouterr().out
    assert play.slurm.calls("scontrol")[-1] == ["update", "JobId=7", "ExcNodeList=n[8-9],n1", "NumNodes=1-2"]


def test_checks_are_made_before_each_attempt(scene):
    play = scene(DIED | {"last_step": 3}, {"outcome": "finished"})
    play.run()
    assert play.checked == [["n1", "n2"]] * 2


@pytest.mark.parametrize("bad", [{"": "no such shards"}, {"n1": "read-only", "n2": "read-only"}])
def test_what_is_wrong_everywhere_starts_nothing(scene, capsys, bad):
    play = scene()
    play.bad = bad
    assert play.run() == NO_NODE
    assert play.attempts == []
    assert "the run can't start on these nodes: " in capsys.readouterr().out


def test_a_job_whose_nodes_slurm_has_taken_away_is_left_alone(scene, capsys):
    """As where the first node's slurmd was lost, and the job starts anew elsewhere while this process lives on."""
    play = scene(DIED | {"then": {"jobs": {"7": "PENDING"}, "nodelist": "(null)"}})
    assert play.run() == 1
    assert "job 7 is PENDING, and the nodes are no longer this process's" in capsys.readouterr().out
    play.slurm.set(plays=[DIED | {"then": {"restarts": 1}}, DIED], jobs={"7": "RUNNING"}, nodelist="n[1-2]")
    assert play.run() == 1
    assert len(play.slurm.calls("srun")) == 2, "they belong to another start of the job"


def test_no_node_is_left(scene):
    play = scene()
    play.slurm.set(nodes={"n1": "DOWN", "n2": "FAIL"})
    assert play.run() == NO_NODE


def test_another_job_that_trains_the_run_is_not_disturbed(scene):
    play = scene()
    RunStatus(play.run_dir).begin(job=6)
    play.slurm.set(jobs={"6": "RUNNING", "7": "RUNNING"})
    with pytest.raises(ConfigError, match="job 6 is RUNNING"):
        play.run()
    with pytest.raises(ConfigError, match="job 6 is RUNNING"):
        Supervisor(play.config, allocation.ThisMachine(), at_once=True).run()
    play.slurm.set(jobs={"7": "RUNNING"}, plays=[{"outcome": "finished"}])
    assert play.run() == 0
    assert [attempt["outcome"] for attempt in play.attempts] == ["failed", "finished"]


def test_what_is_left_of_a_start_that_was_superseded_ends_without_a_word(scene, monkeypatch):
    monkeypatch.setattr(module, "OWNER_S", 0)
    play = scene({"wait": True})

    def take_over() -> None:
        while not play.slurm.started.exists():
            time.sleep(0.01)
        RunStatus(play.run_dir).begin(job=7, restarts=1)

    thread = threading.Thread(target=take_over)
    thread.start()
    assert play.run() == 1
    thread.join()
    assert play.attempts[1]["outcome"] == "running", "it is the other's to say how that one ends"
    assert not play.slurm.calls("scontrol")


def test_slurm_that_does_not_answer_for_a_while_is_waited_for(scene, monkeypatch, capsys):
    play = scene({"outcome": "finished"})
    monkeypatch.setattr(allocation, "_PAUSE_S", 0.05)
    play.slurm.set(jobs={})
    threading.Timer(0.3, lambda: play.slurm.set(away=False)).start()
    play.slurm.set(jobs={"7": "RUNNING"}, away=True)
    assert play.run() == 0
    assert "Unable to contact slurm controller" in capsys.readouterr().err
