"""A thread that ends a rank whose main thread takes too long."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PERIOD_S = 0.25
GRACE_S = 15  # the thread itself may be stuck, where C code holds the interpreter's lock


class Watchdog:
    """Knows what the main thread does and how long that may take.

    Args:
        limits_s: of each phase.
        first_limit_s: of a phase's first time, which compiles and builds.
        on_expiry: called in the thread with what takes too long; it ends the process.
    """

    def __init__(self, limits_s: Mapping[str, float], first_limit_s: float, on_expiry: Callable[[str], Any]):
        self._limits_s, self._first_limit_s, self._on_expiry = limits_s, first_limit_s, on_expiry
        self._seen: set[str] = set()
        self._watched: tuple[str, float, float] | None = None  # phase, limit, deadline
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def enter(self, phase: str) -> None:
        """The main thread begins a phase; the one before has ended."""
        limit_s = self._limits_s[phase] if phase in self._seen else self._first_limit_s
        self._seen.add(phase)
        self._watched = phase, limit_s, time.monotonic() + limit_s
        # In C, for when no Python thread gets to run.
        faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=sys.__stderr__)

    def leave(self) -> None:
        """Nothing is watched until the next phase."""
        self._watched = None
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self._closed.set()
        self.leave()

    def _run(self) -> None:
        while not self._closed.wait(PERIOD_S):
            watched = self._watched
            if watched and time.monotonic() > watched[2]:
                phase, limit_s, _ = watched
                self._on_expiry(f"'{phase}' takes longer than its limit of {limit_s:g} s")
                return


def dump_stacks(path: Path, reason: str) -> None:
    """Write every thread's stack to stderr and to `path`."""
    header = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {socket.gethostname()} process {os.getpid()}: {reason}\n"
    sys.stderr.write(header)
    sys.stderr.flush()
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            stream.write(header)
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
    except OSError as error:
        print(f"the stacks can't be written: {error}", file=sys.stderr, flush=True)
