"""Where a supervised run gets its nodes from: a Slurm job, or this machine alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from launcher.profile import ClusterProfile
from megablip.engine.topology import hosts_of, job_port, node_name
from megablip.errors import ConfigError, MegablipError
from megablip.launch import free_port, lives_here

# What `scontrol requeue` may bring back: neither a job that its user has cancelled, nor one that
# is on its way back already.
_REQUEUED_FROM = {"RUNNING", "TIMEOUT", "PREEMPTED"}
_HAS_NODES = {"RUNNING", "SUSPENDED"}
_ALIVE = {*_HAS_NODES, "COMPLETING", "STOPPED"}
_COMMAND_S = 60  # slurmctld may be busy
_PORTS_TRIED = 100
_TRIES, _PAUSE_S = 20, 15.0


class SlurmError(MegablipError):
    """A command of Slurm's that failed."""


class JobLostError(SlurmError):
    """Slurm has taken the nodes of the job away; another start of it may have them."""


class Allocation(Protocol):
    """The nodes of a run, and what can be asked of whoever lends them."""

    def facts(self) -> dict[str, Any]:
        """What an attempt in RUN/status.json says of it."""
        ...

    def usable_nodes(self) -> tuple[list[str], dict[str, str]]:
        """Nodes that can be used now, in the order of ranks, and the others with what is wrong with them.

        Raises:
            JobLostError: there are none any more.
        """
        ...

    def step(self, nodes: list[str], words: list[str], each_alone: bool = False) -> list[str]:
        """A command line that runs `python WORDS` once on each of `nodes`, in this folder.

        Args:
            each_alone: one that fails does not end the others.
        """
        ...

    def meeting_place(self, nodes: list[str], number: int) -> tuple[str, int]:
        """Address of the first of `nodes`, and a port there, for the number-th attempt."""
        ...

    def is_alive(self, attempt: dict[str, Any]) -> str:
        """Whether another attempt may still be training, in words; empty if not."""
        ...

    def requeue(self, bad_nodes: Iterable[str]) -> str:
        """Ask for the nodes once more, later and without the bad ones; in words, what will become of the run."""
        ...


class ThisMachine:
    """This machine, without Slurm."""

    def facts(self) -> dict[str, Any]:
        return {"nodes": [node_name()]}

    def usable_nodes(self) -> tuple[list[str], dict[str, str]]:
        return [node_name()], {}

    def step(self, nodes: list[str], words: list[str], each_alone: bool = False) -> list[str]:
        return [sys.executable, *words]

    def meeting_place(self, nodes: list[str], number: int) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    def is_alive(self, attempt: dict[str, Any]) -> str:
        return lives_here(attempt) or _lives_in_a_job(attempt)

    def requeue(self, bad_nodes: Iterable[str]) -> str:
        return "start it again to go on"


class SlurmJob:
    """The job that this process is the batch step of.

    Args:
        job: its id.
        restarts: how often it has been requeued.
        nodes: how many it has been given.
        profile: of the cluster.
    """

    def __init__(self, job: int, restarts: int, nodes: int, profile: ClusterProfile):
        self.job, self._restarts, self._nodes, self._profile = job, restarts, nodes, profile

    @classmethod
    def here(cls, profile: ClusterProfile) -> SlurmJob:
        """The job of this process.

        Raises:
            ConfigError: there is none.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("this is no Slurm job", remedy="submit one: python -m launcher slurm RECIPE --submit")
        job, restarts, nodes = (
            int(os.environ.get(f"SLURM_{name}", default))
            for name, default in (("JOB_ID", ""), ("RESTART_COUNT", "0"), ("JOB_NUM_NODES", "1"))
        )
        return cls(job, restarts, nodes, profile)

    def facts(self) -> dict[str, Any]:
        return {"job": self.job, "restarts": self._restarts}

    def usable_nodes(self) -> tuple[list[str], dict[str, str]]:
        facts = self._show("job", str(self.job))
        if facts["JobState"] not in _HAS_NODES or int(facts.get("Restarts", self._restarts)) != self._restarts:
            raise JobLostError(f"job {self.job} is {facts['JobState']}, and the nodes are no longer this process's")
        # Not SLURM_JOB_NODELIST: Slurm takes a node that is lost out of the job.
        nodes = hosts_of(facts["NodeList"])
        bad = {}
        for node in nodes:
            state = self._show("node", node).get("State", "UNKNOWN")
            # IDLE, ALLOCATED+DRAIN, DOWN*: the star is of a node that does not answer.
            if "*" in state or {"DOWN", "FAIL", "NOT_RESPONDING"} & set(re.split(r"[+*]", state)):
                bad[node] = f"Slurm says {state}"
        return [node for node in nodes if node not in bad], bad

    def step(self, nodes: list[str], words: list[str], each_alone: bool = False) -> list[str]:
        # Where one node's ranks have ended, the others' can only wait for them.
        ends = ["--kill-on-bad-exit=0"] if each_alone else ["--kill-on-bad-exit=1", "--wait=60"]
        return [
            "srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}",
            *ends,
            "--overlap",  # a step that has lost a node holds what it had on the others, which the next one needs
            "--cpu-bind=none",  # else all ranks of a node may share the one core of their one task
            "--mpi=none", "--input=none",
            *self._profile.step_command(words, Path.cwd()),
        ]  # fmt: skip

    def meeting_place(self, nodes: list[str], number: int) -> tuple[str, int]:
        facts = self._show("node", nodes[0])
        address = facts.get("NodeAddr") or nodes[0]
        port = job_port(self.job, number)
        if nodes[0] == node_name():
            port = next(
                candidate
                for candidate in (job_port(self.job, number + more) for more in range(_PORTS_TRIED))
                if _is_free(candidate)
            )
        return address, port

    def is_alive(self, attempt: dict[str, Any]) -> str:
        if attempt.get("job") == self.job:  # what an earlier start of this job has left is superseded
            return ""
        return lives_here(attempt) or _lives_in_a_job(attempt)

    def requeue(self, bad_nodes: Iterable[str]) -> str:
        facts = self._show("job", str(self.job))
        if facts["JobState"] not in _REQUEUED_FROM:
            # Cancelled, or requeued by somebody else.
            return f"Slurm has the job as {facts['JobState']}; it is left so"
        try:
            _slurm("scontrol", "requeue", str(self.job))
        except SlurmError as error:
            return f"the job can't be requeued, submit it again to go on: {error}"
        told = f"job {self.job} is requeued"
        if bad := sorted(bad_nodes):
            # Possible from now on only, as the job is pending; it ends when this process does.
            excluded = [listed] if (listed := facts.get("ExcNodeList", "(null)")) != "(null)" else []
            count = self._nodes
            changes = [f"ExcNodeList={','.join([*excluded, *bad])}", f"NumNodes={max(count - len(bad), 1)}-{count}"]
            try:
                _slurm("scontrol", "update", f"JobId={self.job}", *changes)
                told += f" without {', '.join(bad)} (scontrol update, ExcNodeList: to have them back)"
            except SlurmError as error:
                told += f", but {', '.join(bad)} can't be excluded: {error}"
        return told

    def _show(self, kind: str, name: str) -> dict[str, str]:
        """What Slurm knows of a job or a node; patient, for slurmctld may just be started anew."""
        for tries_left in reversed(range(_TRIES)):
            try:
                return show(kind, name)
            except SlurmError as error:
                if not tries_left or "Invalid" in error.what:
                    raise
                print(f"{error.what}; once more in {_PAUSE_S:.0f} s", file=sys.stderr, flush=True)
                time.sleep(_PAUSE_S)
        raise AssertionError("unreachable")


def _lives_in_a_job(attempt: dict[str, Any]) -> str:
    """Whether the job that an attempt belongs to holds nodes, in words; empty if not, or if it belongs to none."""
    try:
        job = attempt.get("job")
        state = job and show("job", str(job)).get("JobState")
    except SlurmError:  # Slurm has forgotten it, or is not here
        return ""
    return f"job {job} is {state}" if state in _ALIVE else ""


def show(kind: str, name: str) -> dict[str, str]:
    """Fields of a job or a node, as Slurm has them now.

    Raises:
        SlurmError: it has none of this name, or does not answer.
    """
    text = _slurm("scontrol", "show", kind, name, "--oneliner")
    return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))


def _slurm(*command: str) -> str:
    """Output of one of Slurm's commands.

    Raises:
        SlurmError: it is not there, or fails, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}", remedy="see whether Slurm answers: scontrol ping") from None
    if done.returncode:
        raise SlurmError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}",
            remedy="see whether Slurm answers: scontrol ping",
        )
    return done.stdout


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            print(f"port {port} of {node_name()} is taken; trying another", file=sys.stderr)
            return False
    return True
