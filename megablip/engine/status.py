"""RUN/status.json: the run's attempts and how each ended.

The deepspeed launcher's exit code does not tell how a run ended, so this file
does.  It is written by the first rank and read by whoever started the ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["running", "finished", "stopped", "failed"]

# sysexits.h EX_TEMPFAIL: asked to stop, saved; start again to go on.
EXIT_CODES: dict[str, int] = {"finished": 0, "stopped": 75, "failed": 1, "running": 1}


class RunStatus:
    """Reads and writes the attempts of one run."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "status.json"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self._path.read_text())["attempts"]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def begin(self, ranks: int) -> None:
        attempt = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "ranks": ranks,
            "outcome": "running",
        }
        self._write([*self.attempts, attempt])

    def update(self, **changes: Any) -> None:
        """Change fields of the newest attempt, such as last_step or outcome.

        A full disk is reported and no more: it is no reason to hide how the run ended.
        """
        attempts = self.attempts or [{"outcome": "running"}]
        attempts[-1] |= changes
        try:
            self._write(attempts)
        except OSError as error:
            print(f"the status can't be written: {error}", file=sys.stderr, flush=True)

    def fail(self, reason: str) -> None:
        """Note why the newest attempt failed, unless a rank has done so before; any rank may call it.

        What follows the first failure, such as lost connections, explains less.
        """
        attempts = self.attempts
        if attempts and attempts[-1].get("outcome") == "running":
            self.update(outcome="failed", reason=reason)

    def _write(self, attempts: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")  # ranks may fail together
        temporary.write_text(json.dumps({"attempts": attempts}, indent=1))
        os.replace(temporary, self._path)
