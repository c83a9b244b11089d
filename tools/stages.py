"""A chain of commands that goes on where it was interrupted.

A stage whose output is there is not run again; one that is interrupted is run
again, and may itself go on from what it has left (training does).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
POLL_S = 0.1  # how often each of several stages side by side is looked at
STOPPED = 75  # exit code: the same command goes on


@dataclass(frozen=True)
class Stage:
    """One command and the folder it makes.

    Attributes:
        reads: files that it depends on beside the stages before it.
        beside: start it together with the next stage.
    """

    name: str
    output: Path
    command: list[str]
    reads: tuple[Path, ...] = ()
    beside: bool = False


class Chain:
    """Runs stages, remembers which are done and how long each took; its journal lies in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._journal = folder / "stages.json"
        self._asked_to_stop = False
        self._running: list[subprocess.Popen[bytes]] = []
        self._names: list[str] = []

    def run(self, todo: list[Stage]) -> None:
        """Raises SystemExit with the exit code of a stage that fails or stops."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._names = [stage.name for stage in todo]
        began, together = time.monotonic(), []
        upstream = ""
        for stage in todo:
            if self._asked_to_stop:  # it came as a stage ended well, or before the second of two was started
                self._finish(together, began)
                print(f"== stopped before {stage.name}; the same command goes on from here", flush=True)
                raise SystemExit(STOPPED)
            # A stage counts only as long as what it reads, its command and all before it are the same.
            own = "".join(path.read_text() for path in stage.reads) + shlex.join(stage.command)
            upstream = hashlib.sha256((upstream + own).encode()).hexdigest()
            journal = self._read()
            entry = journal.get(stage.name, {})
            if entry.get("key") == upstream and entry["done"]:
                print(f"== {stage.name}: done before", flush=True)
            else:
                if entry.get("key") != upstream:
                    shutil.rmtree(stage.output, ignore_errors=True)
                    journal[stage.name] = {"key": upstream, "done": False, "seconds": 0.0}
                    self._journal.write_text(json.dumps(journal, indent=1))
                print(f"== {stage.name}: {shlex.join(stage.command)}", flush=True)
                # A session of its own: a Ctrl-C reaches the stage once, through _stop.
                process = subprocess.Popen(stage.command, cwd=REPOSITORY, start_new_session=True)
                self._running.append(process)
                together.append((stage, process))
            if not stage.beside:
                self._finish(together, began)
                began, together = time.monotonic(), []

    def minutes(self) -> float:
        """Time of the stages that were run last, over all attempts."""
        journal = self._read()
        return sum(journal[name]["seconds"] for name in self._names) / 60

    def _finish(self, together: list[tuple[Stage, subprocess.Popen[bytes]]], began: float) -> None:
        """Wait for stages that run side by side; where one fails the others are stopped, and go on the next time."""
        waiting, failed = list(together), None
        while waiting:
            for stage, process in list(waiting):
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_S)
                    waiting.remove((stage, process))
                    journal = self._read()
                    if not waiting:  # they share the clock: it counts once, with the last
                        journal[stage.name]["seconds"] += time.monotonic() - began
                    journal[stage.name]["done"] = code == 0
                    self._journal.write_text(json.dumps(journal, indent=1))
                    if code != 0 and failed is None:
                        failed = stage, code
                        self._end_running()
        if failed and self._asked_to_stop:
            print(f"== {failed[0].name}: stopped; the same command goes on from here", flush=True)
            raise SystemExit(STOPPED)
        if failed:
            stage, code = failed
            print(f"== {stage.name}: failed with exit code {code}; mend it and start again to go on", flush=True)
            raise SystemExit(code)

    def _read(self) -> dict[str, dict]:
        try:
            return json.loads(self._journal.read_text())
        except (OSError, ValueError):
            return {}

    def _stop(self, number: int, frame: object) -> None:
        self._asked_to_stop = True
        self._end_running()

    def _end_running(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def module(name: str, *arguments: object) -> list[str]:
    """The command of a module of this checkout."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def megablip(*arguments: object) -> list[str]:
    """The installed command."""
    return [str(Path(sys.executable).with_name("megablip")), *map(str, arguments)]
