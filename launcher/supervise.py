"""The life of a run: attempts, one after the other, until it is finished, stopped or beyond help.

    prepare once -> find usable nodes -> one process on each node -> wait -> read the outcome
        finished   done
        stopped    asked to (time limit, preemption, a user): saved; the job is requeued
        failed     once more on the nodes that are left, unless it fails too often, or twice at the same step

Under Slurm this is the batch step, on the first node of the job; `python -m
launcher local` does the same on one machine.  The outcome is what the ranks
wrote into RUN/status.json; no exit code on the way is trusted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.allocation import Allocation, JobLostError
from launcher.preflight import preflight
from megablip.config import Config
from megablip.engine.status import ATTEMPT, EXIT_CODES, RunStatus
from megablip.engine.topology import node_name
from megablip.errors import SupersededError
from megablip.launch import (
    OWNER_S,
    POLL_S,
    KeptProcess,
    StoppedBeforeStart,
    claim,
    conclude,
    heeding,
    prepare,
)
from megablip.metrics.startup import STARTED, process_age_s

NO_NODE = 69  # sysexits.h EX_UNAVAILABLE
AGAIN_S = 15.0  # a signal may be lost while Slurm is still starting the tasks, so it is repeated
PAUSE_S = 5.0  # before another attempt
IDLE_STOPS = 5  # in a row, without a step in between: the time limit is too short, or preemption too frequent


class Supervisor:
    """Sees one run through.

    Args:
        config: the recipe.
        allocation: where its nodes come from.
        at_once: a second signal ends everything without saving; under Slurm Slurm does that.
    """

    def __init__(self, config: Config, allocation: Allocation, at_once: bool):
        self._config, self._allocation, self._at_once = config, allocation, at_once
        self._run_dir = Path(config.run_dir)
        self._asked: list[int] = []
        self._may_raise = False
        self._kept: KeptProcess | None = None
        self._bad_nodes: dict[str, str] = {}
        self._attempts_before = 0
        self._checked = False
        self._began = time.time() - process_age_s()  # this attempt: what the time to its first step counts from

    def run(self) -> int:
        """The exit code: 0 finished, 75 stopped, 1 failed, 69 no node can be used.

        Raises:
            ConfigError, ShardError: from `prepare`, before the first attempt.
        """
        with heeding(self._on_signal):
            if is_finished(self._config):
                say(f"{self._run_dir} is finished already")
                return EXIT_CODES["finished"]
            return self._live()

    def _live(self) -> int:
        self._attempts_before = len(RunStatus(self._run_dir).attempts)
        try:
            say(f"preparing {self._run_dir} on {node_name()}")
            with self._stoppable():
                claim(self._config, self._allocation.is_alive)
                config_path = prepare(self._config)
            while True:
                with self._stoppable():
                    nodes = self._find_nodes(config_path)
                if not nodes:
                    return NO_NODE
                attempt = self._attempt(config_path, nodes)
                if attempt["outcome"] == "finished":
                    return EXIT_CODES["finished"]
                if why := self._hopeless():
                    say(why)
                    return EXIT_CODES["failed"]
                if self._asked or attempt["outcome"] == "stopped":
                    return self._stop(attempt)
                say(f"attempt {attempt['id']} failed: {attempt.get('reason')}; once more in {PAUSE_S:.0f} s")
                with self._stoppable():
                    time.sleep(PAUSE_S)
        except StoppedBeforeStart:
            say("stopped while no rank was there")
            return self._stop({"outcome": "stopped"})
        except (SupersededError, JobLostError) as error:
            say(str(error))
            return EXIT_CODES["failed"]

    def _find_nodes(self, config_path: Path) -> list[str]:
        """Nodes that Slurm has up and that pass their checks, in the order of ranks; none if the run can't go on."""
        nodes, bad = self._allocation.usable_nodes()
        self._leave_out(bad)
        while nodes:
            say(f"checking {', '.join(nodes)}")
            meeting_place = self._allocation.meeting_place(nodes, self._number)
            step = partial(self._allocation.step, nodes, each_alone=True)
            report = preflight(config_path, nodes, meeting_place, step)
            if not (report.ok and self._checked):
                report.print()
            self._checked = True
            if report.ok:
                return nodes
            self._leave_out(report.bad)
            nodes = report.usable  # once more, as they are to work together
            if not nodes:
                say(f"the run can't start on these nodes: {report.reason}")
        return nodes

    def _leave_out(self, bad: dict[str, str]) -> None:
        for node, reason in bad.items():
            say(f"{node} is left out: {reason}")
        self._bad_nodes |= bad

    def _attempt(self, config_path: Path, nodes: list[str]) -> dict[str, Any]:
        """Start the ranks on some nodes and wait until they are gone; how it ended."""
        status = RunStatus(self._run_dir)
        address, port = self._allocation.meeting_place(nodes, self._number)
        facts = {"nodes": nodes, "duration": str(self._config.duration)} | self._allocation.facts()
        status.begin(ranks=len(nodes) * self._config.engine.ranks, **facts)
        say(f"attempt {status.attempt} on {', '.join(nodes)}")
        words = ["-m", "launcher", "node", str(config_path.resolve())]
        words += ["--nodes", ",".join(nodes), "--master", f"{address}:{port}"]
        code = self._wait(self._allocation.step(nodes, words), status)
        attempt = conclude(status, asked=bool(self._asked), reason=f"exit code {code}")
        if attempt["outcome"] == "failed":
            left, _ = self._allocation.usable_nodes()
            if lost := [node for node in nodes if node not in left]:
                status.update(lost=lost)
        return status.current

    @property
    def _number(self) -> int:
        """Of attempts so far; each one meets at another port, as the one before may still hold its own."""
        return len(RunStatus(self._run_dir).attempts)

    def _wait(self, command: list[str], status: RunStatus) -> int:
        self._kept = KeptProcess(command, os.environ | {ATTEMPT: status.attempt, STARTED: str(self._began)})
        looked = told = 0.0
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return self._kept.process.wait(POLL_S)
                if time.monotonic() - looked > OWNER_S:
                    looked = time.monotonic()
                    status.check_owner()
                if self._asked and time.monotonic() - told > AGAIN_S:
                    told = time.monotonic()
                    self._pass_on()
        finally:
            self._kept.close()
            self._kept, self._began = None, time.time()

    def _stop(self, attempt: dict[str, Any]) -> int:
        """The run has been stopped, and saved if there was anything to save."""
        limit = self._config.stop_after_steps
        if limit and attempt.get("last_step", 0) >= limit:
            say(f"stopped at step {attempt['last_step']}, as stop_after_steps says")
        else:
            say(self._allocation.requeue(self._bad_nodes))
        return EXIT_CODES[attempt["outcome"]]

    def _hopeless(self) -> str:
        """Why another attempt would not help; empty if it may."""
        attempts = RunStatus(self._run_dir).attempts
        job = self._allocation.facts().get("job")
        ours = [
            attempt
            for number, attempt in enumerate(attempts)
            if number >= self._attempts_before or (job is not None and attempt.get("job") == job)
        ]
        failed = [attempt for attempt in ours if attempt["outcome"] == "failed"]
        since = datetime.now().astimezone() - timedelta(hours=1)
        recent = [attempt for attempt in failed if datetime.fromisoformat(attempt["ended"]) > since]
        limit = self._config.health.restarts_per_hour
        if len(recent) > limit:
            return _diagnosis(f"the run failed {len(recent)} times within an hour", recent)
        last = ours[-2:]
        same = len(last) == 2 and all(attempt["outcome"] == "failed" and not attempt.get("lost") for attempt in last)
        if same and _step(last[0]) == _step(last[1]):
            return _diagnosis(f"the run failed twice {_where(last[0])}", last)
        idle = ours[-IDLE_STOPS:]
        if len(idle) == IDLE_STOPS and all(
            attempt["outcome"] == "stopped" and attempt.get("last_step") == attempt.get("first_step")
            for attempt in idle
        ):
            return _diagnosis(f"the run was stopped {IDLE_STOPS} times without a single step", idle)
        return ""

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """A part of the work that a signal may break off."""
        self._may_raise = True
        try:
            if self._asked:
                raise StoppedBeforeStart
            yield
        finally:
            self._may_raise = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)
        if self._kept is None:
            if self._may_raise:
                raise StoppedBeforeStart
        elif len(self._asked) == 1:
            self._pass_on()
        elif self._at_once:
            self._kept.kill()

    def _pass_on(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._kept.process.pid, signal.SIGUSR1)


def is_finished(config: Config) -> bool:
    """Whether a run's last attempt has done all that the recipe asks for."""
    run_dir = Path(config.run_dir)
    attempt = RunStatus(run_dir).current
    return (
        config.resume == "auto"
        and attempt.get("outcome") == "finished"
        and attempt.get("duration") == str(config.duration)
        and (run_dir / "checkpoints" / f"step_{attempt.get('last_step', -1):08d}" / "COMMITTED").exists()
    )


def _step(attempt: dict[str, Any]) -> int | None:
    """How many steps the run had done when an attempt ended; None if the ranks had not got so far as to know."""
    return attempt.get("last_step")


def _where(attempt: dict[str, Any]) -> str:
    step = _step(attempt)
    return "before its first step" if step is None else f"after step {step}"


def _diagnosis(what: str, attempts: list[dict[str, Any]]) -> str:
    lines = [f"{what}; it is not started once more"]
    for attempt in attempts:
        reason = str(attempt.get("reason", "no reason is known")).replace("\n", "\n      ")
        lines.append(f"  attempt {attempt['id']} on {', '.join(attempt.get('nodes', []))}, {_where(attempt)}:")
        lines.append(f"      {reason}")
    lines.append("  to do: mend what the reasons name, then start it again; it goes on from its newest checkpoint")
    return "\n".join(lines)


def say(text: str) -> None:
    """A line of the job's log."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
