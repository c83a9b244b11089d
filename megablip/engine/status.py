"""RUN/status.json: the run's attempts and how each ended.

The deepspeed launcher's exit code does not tell how a run ended, so this file
does.  An attempt is begun by whoever starts the ranks, on one machine or a
hundred; the ranks find its id in their environment, and the first of them
writes down how it went.

The newest attempt owns the run directory.  What is left of an earlier one,
on a node that was cut off, can see here that it was superseded, and must
neither train on nor commit a checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from megablip.engine.topology import Topology, node_name
from megablip.errors import ConfigError, SupersededError

Outcome = Literal["running", "finished", "stopped", "failed"]

# sysexits.h EX_TEMPFAIL: asked to stop, saved; start again to go on.
EXIT_CODES: dict[str, int] = {"finished": 0, "stopped": 75, "failed": 1, "running": 1}

ATTEMPT = "MEGABLIP_ATTEMPT"
"""Environment variable: the attempt that a rank belongs to."""
_LOCK_S = 5.0  # whoever holds it writes one small file


class RunStatus:
    """Reads and writes the attempts of one run.

    Args:
        attempt: id of the attempt that this process belongs to, if there is one.
    """

    def __init__(self, run_dir: Path, attempt: str | None = None):
        self.run_dir, self.attempt = run_dir, attempt
        self._path = run_dir / "status.json"

    @classmethod
    def of_rank(cls, run_dir: Path) -> RunStatus:
        """As a rank, which was told its attempt."""
        return cls(run_dir, os.environ.get(ATTEMPT))

    @classmethod
    def join(cls, run_dir: Path, topology: Topology) -> None:
        """Where who started the ranks has begun no attempt, the first rank does (a collective then)."""
        if ATTEMPT not in os.environ:
            begun = cls(run_dir).begin(ranks=topology.world) if topology.is_first else None
            os.environ[ATTEMPT] = topology.gather(begun)[0]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """From the first to the newest; empty if there is no such file, or none that can be read."""
        try:
            attempts = json.loads(self._path.read_text())["attempts"]
            return [attempt for attempt in attempts if isinstance(attempt, dict)]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def current(self) -> dict[str, Any]:
        """This process's attempt, or the newest; empty if there is none."""
        return self._own(self.attempts) or {}

    def begin(self, **facts: Any) -> str:
        """Add an attempt, which supersedes all others; its id.

        Args:
            facts: more of its fields, such as ranks and nodes.

        Raises:
            ConfigError: it can't be written.
        """
        with self._locked():
            attempts = self.attempts
            for earlier in attempts:
                if earlier.get("outcome") == "running":
                    earlier |= {"outcome": "failed", "ended": _now(), "reason": "it never said how it ended"}
            self.attempt = f"{len(attempts) + 1}-{secrets.token_hex(4)}"
            attempt = {
                "id": self.attempt,
                "started": _now(),
                "host": node_name(),
                "pid": os.getpid(),
                **facts,
                "outcome": "running",
            }
            try:
                self._write([*attempts, attempt])
            except OSError as error:
                raise ConfigError(f"the run's status can't be written: {error}", where=str(self._path)) from None
        return self.attempt

    def update(self, **changes: Any) -> None:
        """Change fields of this attempt, such as last_step or outcome.

        A full disk is reported and no more: it is no reason to hide how the run ended.
        """
        try:
            with self._locked():
                attempts = self.attempts
                own = self._own(attempts)
                if own is None:  # the file was lost meanwhile
                    own = {"id": self.attempt, "outcome": "running"}
                    attempts.append(own)
                own |= changes
                self._write(attempts)
        except OSError as error:
            print(f"the status can't be written: {error}", file=sys.stderr, flush=True)

    def end(self, outcome: Outcome, **facts: Any) -> None:
        """Note how this attempt ended."""
        self.update(outcome=outcome, ended=_now(), **facts)

    def fail(self, reason: str, **facts: Any) -> None:
        """Note why this attempt failed, unless a rank has done so before; any rank may call it.

        What follows the first failure, such as lost connections, explains less.
        """
        if self.current.get("outcome") == "running":
            self.end("failed", reason=reason, **facts)

    @property
    def superseded_by(self) -> dict[str, Any] | None:
        """The newest attempt, if this process's is an older one."""
        attempts = self.attempts
        ids = [attempt.get("id") for attempt in attempts]
        return attempts[-1] if self.attempt and self.attempt in ids[:-1] else None

    def check_owner(self) -> None:
        """Raises SupersededError if a newer attempt has begun."""
        if newer := self.superseded_by:
            raise SupersededError(
                f"attempt {newer.get('id')} has taken the run over from attempt {self.attempt}",
                where=f"{self._path}, on {newer.get('host')} since {newer.get('started')}",
                remedy="nothing: what is left of the older attempt ends here",
            )

    def _own(self, attempts: list[dict[str, Any]]) -> dict[str, Any] | None:
        found = [attempt for attempt in attempts if self.attempt in (None, attempt.get("id"))]
        return found[-1] if found else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps others from writing between a read and a write, where the file system has locks."""
        lock = FileLock(self._path.with_suffix(".lock"), timeout=_LOCK_S)
        held = True
        try:
            lock.acquire()
        except OSError:  # filelock's Timeout is one, too
            held = False  # to write without it is better than not to write
        try:
            yield
        finally:
            if held:
                lock.release()

    def _write(self, attempts: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")  # ranks may fail together
        temporary.write_text(json.dumps({"attempts": attempts}, indent=1))
        os.replace(temporary, self._path)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
