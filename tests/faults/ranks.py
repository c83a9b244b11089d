"""Starts ranks of tests.faults.rank by hand, without a launcher, and waits for their end."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megablip.config import load_config
from megablip.launch import prepare_run
from tests.distributed import runs


@dataclass
class Ended:
    code: int
    output: str
    at: float  # time.monotonic()


class FaultyRun:
    """The ranks of one run.

    Args:
        fault: a function of tests.faults.rank.
        environment: more variables for the ranks.
    """

    def __init__(self, fault: str, recipe: Path, *overrides: str, **environment: str):
        config = load_config(recipe, list(overrides))
        self.run_dir = Path(config.run_dir)
        path = prepare_run(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        self._outputs = []
        for rank in range(config.engine.ranks):
            place: dict[str, Any] = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.engine.ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            output = self.run_dir / f"output_{rank}.txt"
            self._outputs.append(output)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.rank", fault, str(path)],
                    cwd=runs.REPOSITORY,
                    env=runs.environment() | {name: str(value) for name, value in place.items()} | environment,
                    stdout=output.open("w"),
                    stderr=subprocess.STDOUT,
                )
            )

    def output(self, rank: int) -> str:
        return self._outputs[rank].read_text()

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Until a rank has printed it."""
        end = time.monotonic() + timeout_s
        while not any(text in self.output(rank) for rank in range(len(self.processes))):
            assert time.monotonic() < end, f"no '{text}'"
            assert any(process.poll() is None for process in self.processes), self.output(0)
            time.sleep(0.02)

    def end(self, timeout_s: float = 120, ranks: list[int] | None = None) -> list[Ended]:
        """How each rank ended; those that did not are killed and fail the test."""
        waiting = dict(enumerate(self.processes)) if ranks is None else {r: self.processes[r] for r in ranks}
        ended: dict[int, Ended] = {}
        limit = time.monotonic() + timeout_s
        while len(ended) < len(waiting) and time.monotonic() < limit:
            for rank, process in waiting.items():
                if rank not in ended and process.poll() is not None:
                    ended[rank] = Ended(process.returncode, self.output(rank), time.monotonic())
            time.sleep(0.02)
        for process in self.processes:
            process.kill()
            process.wait()
        hanging = sorted(set(waiting) - set(ended))
        assert not hanging, f"ranks {hanging} did not end: {[self.output(rank)[-3000:] for rank in hanging]}"
        return [ended[rank] for rank in sorted(ended)]
