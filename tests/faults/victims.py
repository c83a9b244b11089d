"""Ranks that start in a second and die at once: forked from a process that has the imports behind it.

with Nursery() as nursery:
    victim = nursery.start(config_path, ranks=2, log=path)
    victim.kill()
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class Victim:
    """The ranks of one attempt, `python -m megablip.train` in all but the imports, each the leader of a group."""

    def __init__(self, pids: list[int], log: Path):
        self.pids, self.log = pids, log

    def kill(self) -> None:
        """kill -9 of every rank with its children; all at once to the ranks, as a node that is lost."""
        for pid in self.pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(30)

    @property
    def running(self) -> bool:
        return any(_is_alive(pid) for pid in self.pids)

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running:
            assert time.monotonic() < deadline, f"still running:\n{self.output()[-3000:]}"
            time.sleep(0.01)

    def output(self) -> str:
        """What its ranks have printed."""
        return self.log.read_text(errors="replace")


class Nursery:
    """Holds the process that victims are forked from; it runs one thread and nothing of OpenMP, so a fork is sound."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(10)

    def start(self, config: Path, ranks: int, log: Path) -> Victim:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        order = {"config": str(config), "ranks": ranks, "log": str(log), "port": port}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Victim(json.loads(self._process.stdout.readline()), log)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _serve() -> None:
    import megablip.train  # with torch, transformers and DeepSpeed behind it

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's to bury
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(order, rank, megablip.train.main)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        answers.flush()


def _be_rank(order: dict, rank: int, main) -> None:
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["ranks"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"]),
        }  # fmt: skip
        sys.argv = ["megablip.train", order["config"]]
        main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    _serve()
