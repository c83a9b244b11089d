"""Runs a function on several ranks (processes over gloo) and collects what each returns."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def run_ranks(world: int, function: str, *arguments: Any, timeout_s: float = 180) -> list[Any]:
    """Call `module:function(topology, *arguments)` on each rank.

    Arguments and results travel as JSON. A rank that fails makes this raise
    with its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(world)]
        processes = []
        for rank in range(world):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            command = [sys.executable, "-m", __name__, function, json.dumps(arguments), str(results[rank])]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        outputs = []
        try:
            outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{outputs[rank][-4000:]}")
        return [json.loads(path.read_text()) for path in results]


def _main() -> None:
    from megablip.engine.topology import init_distributed

    function, arguments, result = sys.argv[1:]
    module, _, name = function.partition(":")
    topology = init_distributed(timeout_s=60, threads=1)
    outcome = getattr(importlib.import_module(module), name)(topology, *json.loads(arguments))
    Path(result).write_text(json.dumps(outcome))
    topology.leave()


if __name__ == "__main__":
    _main()
