"""`megablip train`: checks what can be checked at once, then starts the ranks of this machine.

The ranks run `megablip.train` under the deepspeed launcher.  The launcher
answers a signal by killing its ranks, and its exit code does not tell a saved
stop from a crash; so it runs in a session of its own, signals go from here to
the ranks directly, and the outcome is read from RUN/status.json.

The programs of launcher/ start a machine's ranks with what stands here, too.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megablip.checkpoint.start import check_start
from megablip.config import Config, dump_config, held_out_run, load_config, refuse_changes
from megablip.data.samples import index_sources
from megablip.data.shards import expand_shards
from megablip.engine.ds_config import read_ds_config
from megablip.engine.status import ATTEMPT, EXIT_CODES, RunStatus
from megablip.engine.topology import gpus_there, has_gpu, job_port, node_name
from megablip.errors import ConfigError
from megablip.metrics.points import last_step
from megablip.metrics.startup import STARTED, process_age_s
from megablip.model.layout import check_tokenizer

RESOLVED_CONFIG = "config.yaml"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 1.0
GRACE_S = 10.0  # once a rank has ended, for the others to end, too
OWNER_S = 5.0  # between two looks whether a newer attempt has taken the run over


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of an attempt, and which of them this one is.

    Args:
        slots: ranks of each machine, in the order of ranks.
        node_rank: this machine's place among them.
        master_address: where rank 0 is, as the others reach it.
        master_port: where rank 0's store listens.
    """

    slots: dict[str, int]
    node_rank: int
    master_address: str
    master_port: int

    @classmethod
    def alone(cls, ranks: int) -> Machines:
        """This machine by itself, at a port that is free."""
        return cls({"localhost": ranks}, 0, "127.0.0.1", free_port())


def launch(recipe: Path, overrides: list[str]) -> int:
    """Run a recipe to its end or to a stop on this machine; the exit code of `megablip train`.

    Raises:
        ConfigError, ShardError: before any rank is started.
    """
    try:
        with RankGroup() as ranks:
            config = load_config(recipe, overrides)
            claim(config, lives_here)
            config_path = prepare(config)
            status = RunStatus(Path(config.run_dir))
            status.begin(ranks=config.engine.ranks)
            return_code = ranks.run(config, config_path, Machines.alone(config.engine.ranks), status)
    except StoppedBeforeStart:
        print("stopped before the ranks had started")
        return EXIT_CODES["stopped"]
    reason = f"they did not say why (exit code {return_code} of their launcher)"
    if len(ranks.asked) > 1:
        reason = "left at once at a second signal, without saving"
    attempt = conclude(status, asked=bool(ranks.asked), reason=reason)
    if "first_step" not in attempt or attempt["outcome"] == "failed":
        print(f"{attempt['outcome']}: {attempt.get('reason')}", file=sys.stderr)
    return EXIT_CODES[attempt["outcome"]]


def conclude(status: RunStatus, *, asked: bool, reason: str) -> dict[str, Any]:
    """Note how an attempt ended whose ranks are gone, as far as they have not done so; the attempt.

    Args:
        asked: whether they had been asked to stop.
        reason: why they may have ended without a word: killed, out of memory, crashed in C.
    """
    attempt = status.current
    started = "first_step" in attempt
    if started and "last_step" not in attempt:
        status.update(last_step=max(last_step(status.run_dir), attempt["first_step"]))
    if attempt["outcome"] == "running":
        if asked and not started:
            status.end("stopped", reason="stopped before the ranks had started")
        else:
            phase = "ended without a word" if started else "did not start"
            status.end("failed", reason=f"the ranks {phase}: {reason}")
    return status.current


def claim(config: Config, is_alive: Callable[[dict[str, Any]], str]) -> None:
    """Make sure that nobody else trains the run, and note the end of an attempt that could not do so itself.

    Args:
        is_alive: says of an attempt that has not ended whether it may still be training, in words; empty if not.

    Raises:
        ConfigError: another attempt is at work.
    """
    attempt = RunStatus(Path(config.run_dir)).current
    if attempt.get("outcome") != "running":
        return
    if who := is_alive(attempt):
        raise ConfigError(
            f"another attempt is training this run: {who}",
            where=f"{config.run_dir}, attempt {attempt.get('id')} since {attempt.get('started')}",
            remedy="stop that one first, or choose another run_dir",
        )
    conclude(RunStatus(Path(config.run_dir), attempt.get("id")), asked=False, reason="and who had started them is gone")


def lives_here(attempt: dict[str, Any]) -> str:
    """Whether the process that began an attempt is there, if it was begun on this machine; in words, empty if not."""
    if attempt.get("job") is not None or attempt.get("host") != node_name():
        return ""
    try:
        process = psutil.Process(int(attempt["pid"]))
        # Process ids are given out again; its started field counts whole seconds.
        began = datetime.fromisoformat(attempt["started"]).timestamp()
        return f"process {process.pid}" if process.create_time() < began + 1 and process.pid != os.getpid() else ""
    except (psutil.Error, KeyError, ValueError, TypeError):
        return ""


def prepare(config: Config) -> Path:
    """Everything that is done once before ranks are started: checks, the resolved config, indices of the shards.

    Returns:
        The resolved config's path.

    Raises:
        ConfigError, ShardError: see `prepare_run`, `check_tokenizer` and `index_sources`.
    """
    config_path = prepare_run(config)
    check_tokenizer(config.model)
    index_sources(config.data)
    if held_out := held_out_run(config):
        index_sources(held_out.data)
    return config_path


def prepare_run(config: Config) -> Path:
    """Check paths and the run directory, and write the resolved config into it.

    Raises:
        ConfigError: nothing that a stage can start from, a DeepSpeed config that is not
            supported, or the directory belongs to another recipe.
        ShardError: a source without shards.
    """
    read_ds_config(config.engine)
    for source in config.data.sources + config.held_out.sources:
        expand_shards(source.shards)
    check_start(config.model.path)
    run_dir = Path(config.run_dir)
    path = run_dir / RESOLVED_CONFIG
    has_checkpoints = any((run_dir / "checkpoints").glob("step_*/COMMITTED"))
    if has_checkpoints and config.resume == "never":
        raise ConfigError(
            "the run directory already has checkpoints and resume is never",
            where=str(run_dir),
            remedy="choose another run_dir, or resume=auto to go on",
        )
    if has_checkpoints and path.exists():
        refuse_changes(load_config(path), config, str(run_dir))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(dump_config(config))
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"the run directory can't be written: {error}", where=str(run_dir)) from None
    return path


def launcher_command(config_path: Path, machines: Machines) -> list[str]:
    """The deepspeed launcher's command line for this machine: what `deepspeed --no_ssh` would start on it.

    Raises:
        ConfigError: fewer GPUs than ranks.
    """
    # Its half for one node; the half that searches for nodes would import torch and DeepSpeed once more.
    own, ranks = list(machines.slots.items())[machines.node_rank]
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    on_gpu = has_gpu() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    left = len(given) or (gpus_there() if on_gpu else 0)  # 0: not known, or none is needed
    if 0 < left < ranks:
        there = "CUDA_VISIBLE_DEVICES leaves" if given else "there are only"
        raise ConfigError(
            f"{ranks} ranks need as many GPUs, but {there} {left}",
            where=f"engine.ranks, on {own}",
            remedy="start fewer ranks, or let them see more GPUs",
        )
    # Of the others only the number of ranks matters here.
    nodes = {host: list(range(slots)) for host, slots in machines.slots.items()} | {
        own: given[:ranks] or list(range(ranks))
    }
    return [
        sys.executable, "-m", "deepspeed.launcher.launch", "--quiet",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()}",
        f"--node_rank={machines.node_rank}",
        "--master_addr", machines.master_address,
        "--master_port", str(machines.master_port),
        "--no_local_rank", "--module", "megablip.train", str(config_path),
    ]  # fmt: skip


@contextmanager
def heeding(on_signal: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give STOP_SIGNALS to `on_signal` meanwhile; in the main thread."""
    previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StoppedBeforeStart(BaseException):
    """A signal came while there were no ranks to save anything."""


class KeptProcess:
    """A process in a session of its own, which does not outlive this one.

    However this process ends, kill -9 included, all of the other's group is
    killed: ranks without a launcher would hold ports and GPU memory for ever.
    A small third process sees to it; its standard input closes when this process ends.

    Args:
        blocked: signals that wait until the process, or one that it starts, unblocks them.
    """

    _KEEPER = "import os, sys; group = int(sys.stdin.readline() or 0); sys.stdin.read(); group and os.killpg(group, 9)"

    def __init__(self, command: list[str], environment: dict[str, str], blocked: tuple[int, ...] = ()):
        nothing = subprocess.DEVNULL
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self._KEEPER],
            stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True,
        )  # fmt: skip
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal must not reach it
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked),
        )
        self._keeper.stdin.write(b"%d\n" % self.process.pid)
        self._keeper.stdin.flush()

    def members(self) -> list[psutil.Process]:
        """The processes of its group; also when it has ended itself."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(pid) == self.process.pid:
                    found.append(psutil.Process(pid))
        return found

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill what has outlived the process itself."""
        self.kill()
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdin.close()


class RankGroup:
    """The deepspeed launcher with this machine's ranks, from before they exist until all have ended.

    Signals to this process go to the ranks.  Before there are any, the first
    one ends everything, as nothing has been trained that could be saved; later
    the second one does.

    Use as a context manager, in the main thread.

    Args:
        patient: a second signal does nothing; for a process that is signalled by several others, of
            whom the last one will kill it anyway.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked: list[int] = []
        """Signals that asked to stop."""
        self._patient = patient
        self._starting = False
        self._kept: KeptProcess | None = None

    def __enter__(self) -> RankGroup:
        self._heeding = heeding(self._on_signal)
        self._heeding.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heeding.__exit__(*error)

    def run(self, config: Config, config_path: Path, machines: Machines, status: RunStatus) -> int:
        """Start this machine's ranks, wait until all have ended; the launcher's exit code.

        Args:
            status: with the attempt that they belong to; they are killed when a newer one begins.
        """
        command = launcher_command(config_path, machines)
        ranks = list(machines.slots.values())[machines.node_rank]
        self._starting = True
        # Some clusters signal all processes of a job, and the launcher would kill its ranks, or die. To the
        # ranks, which inherit this, a signal comes as soon as they can heed it (StopSignal).
        self._kept = KeptProcess(command, _environment(config, ranks, status), blocked=STOP_SIGNALS)
        if self.asked:  # while it was being started
            self._kept.kill()
        try:
            return self._wait(lambda: status.superseded_by)
        finally:
            self._kept.close()

    def _wait(self, superseded_by: Callable[[], dict[str, Any] | None]) -> int:
        most, since, looked = 0, None, time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._kept.process.wait(POLL_S)
            if time.monotonic() - looked > OWNER_S:
                looked = time.monotonic()
                if newer := superseded_by():
                    print(f"attempt {newer.get('id')} has taken the run over; the ranks here are killed", flush=True)
                    self._kept.kill()
            ranks = self._ranks()
            most = max(most, len(ranks))
            # Ranks end together.  The launcher would wait 30 s for each one that does
            # not, one after the other, and a stopped one does not even see SIGTERM.
            if len(ranks) == most:
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since > GRACE_S:
                for rank in ranks:
                    with suppress(psutil.Error):
                        rank.kill()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if not self._starting:
            raise StoppedBeforeStart
        if self._kept is None:
            return  # `run` looks as soon as it is there
        ranks = self._ranks()
        if not ranks or (len(self.asked) > 1 and not self._patient):
            self._kept.kill()
        elif len(self.asked) > 1:
            return
        for rank in ranks:
            with suppress(psutil.Error):  # it may have ended by itself
                rank.send_signal(signal.SIGTERM)

    def _ranks(self) -> list[psutil.Process]:
        found = {}  # each with the process that has started it
        for process in self._kept.members():
            with suppress(psutil.Error):
                command = process.cmdline()
                if "megablip.train" in command and not any("deepspeed.launcher" in word for word in command):
                    found[process] = process.ppid()
        # What a rank starts has the rank's command line until it has its own.
        pids = {process.pid for process in found}
        return [process for process, parent in found.items() if parent not in pids]


def _environment(config: Config, ranks: int, status: RunStatus) -> dict[str, str]:
    # Where torchrun has started this process its store is none for the ranks, who would wait for it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment = {STARTED: str(time.time() - process_age_s())} | inherited
    if status.attempt:
        environment[ATTEMPT] = status.attempt
    if config.engine.threads:
        environment["OMP_NUM_THREADS"] = str(config.engine.threads)
    # Idle OpenMP threads that spin would take the other ranks' cores.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not has_gpu():
        # On a CPU the launcher counts NUMA nodes as devices unless told.
        environment["LOCAL_SIZE"] = str(ranks)
    elif "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name, the only one that torch before 2.11 heeds
        # Micro-batches differ in their numbers of tiles and tokens. Without it the allocator's fixed segments fit none
        # of them after a while, and memory runs out that is free.
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return environment


def free_port() -> int:
    """Of this machine; below those that systems give to connections, one of which might take it until it is used."""
    while True:
        with socket.socket() as probe:
            port = job_port(secrets.randbelow(1 << 16), 0)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
