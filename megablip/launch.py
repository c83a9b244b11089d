"""`megablip train`: checks what can be checked at once, then starts the ranks.

The ranks run `megablip.train` under the deepspeed launcher.  The launcher
answers a signal by killing its ranks, and its exit code does not tell a saved
stop from a crash; so it runs in a session of its own, signals go from here to
the ranks directly, and the outcome is read from RUN/status.json.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from megablip.checkpoint.start import check_start
from megablip.config import Config, dump_config, held_out_run, load_config, refuse_changes
from megablip.data.samples import index_sources
from megablip.data.shards import expand_shards
from megablip.engine.ds_config import read_ds_config
from megablip.engine.status import EXIT_CODES, RunStatus
from megablip.engine.topology import has_gpu
from megablip.errors import ConfigError
from megablip.metrics.startup import STARTED, process_age_s
from megablip.model.layout import check_tokenizer

RESOLVED_CONFIG = "config.yaml"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 1.0
GRACE_S = 10.0  # once a rank has ended, for the others to end, too


def launch(recipe: Path, overrides: list[str]) -> int:
    """Run a recipe to its end or to a stop; the exit code of `megablip train`.

    Raises:
        ConfigError, ShardError: before any rank is started.
    """
    try:
        with RankGroup() as ranks:
            config = load_config(recipe, overrides)
            config_path = prepare_run(config)
            check_tokenizer(config.model)
            index_sources(config.data)
            if held_out := held_out_run(config):
                index_sources(held_out.data)
            status = RunStatus(Path(config.run_dir))
            attempts_before = len(status.attempts)
            return_code = ranks.run(launcher_command(config, config_path), _environment(config))
    except _StoppedBeforeStart:
        print("stopped before the ranks had started")
        return EXIT_CODES["stopped"]
    if len(status.attempts) == attempts_before:
        status.begin(config.engine.ranks)
        if ranks.asked:
            print("stopped before the ranks had started")
            status.update(outcome="stopped")
        else:
            print("the ranks did not start; their messages are above", file=sys.stderr)
            status.update(outcome="failed", reason="the ranks did not start")
    outcome = status.attempts[-1]["outcome"]
    if outcome == "running":
        # The ranks ended without a word: killed, out of memory, crashed in C.
        reason = f"the ranks ended without a word (launcher's exit code {return_code})"
        if len(ranks.asked) > 1:
            reason = "left at once at a second signal, without saving"
        print(f"{reason}; start again to resume from the newest checkpoint", file=sys.stderr)
        status.update(outcome="failed", reason=reason)
        outcome = "failed"
    return EXIT_CODES[outcome]


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


def launcher_command(config: Config, config_path: Path) -> list[str]:
    """The deepspeed launcher's command line for this machine."""
    # Its half for one node; the half that searches for nodes would import torch and DeepSpeed once more.
    ranks = config.engine.ranks
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if given and len(given) < ranks:
        raise ConfigError(
            f"{ranks} ranks need as many GPUs, but CUDA_VISIBLE_DEVICES leaves {len(given)}",
            where="engine.ranks",
            remedy="start fewer ranks, or let them see more GPUs",
        )
    nodes = {"localhost": given[:ranks] or list(range(ranks))}
    return [
        sys.executable, "-m", "deepspeed.launcher.launch", "--quiet",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()}",
        "--master_port", str(_free_port()),
        "--no_local_rank", "--module", "megablip.train", str(config_path),
    ]  # fmt: skip


class _StoppedBeforeStart(BaseException):
    """A signal came while the launcher did not exist."""


class RankGroup:
    """The deepspeed launcher with its ranks, from before they exist until all have ended.

    Signals to this process go to the ranks.  Before there are any, the first
    one ends everything, as nothing has been trained that could be saved; later
    the second one does.

    Use as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        """Signals that asked to stop."""
        self._starting = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RankGroup:
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Start the launcher, wait until all has ended; its exit code."""
        self._starting = True
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal must not reach the launcher
            # Were SIGUSR1 sent to all of a job, the launcher would die of it; the ranks catch it later.
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        if self.asked:  # while it was being started
            self._kill()
        most, since = 0, None
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(POLL_S)
            ranks = _rank_processes(self._process.pid)
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
            raise _StoppedBeforeStart
        if self._process is None:
            return  # `run` looks as soon as it is there
        ranks = _rank_processes(self._process.pid)
        if len(self.asked) > 1 or not ranks:
            self._kill()
        for rank in ranks:
            with suppress(psutil.Error):  # it may have ended by itself
                rank.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _rank_processes(launcher_pid: int) -> list[psutil.Process]:
    ranks = []
    try:
        children = psutil.Process(launcher_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in children:
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "megablip.train" in command and not any("deepspeed.launcher" in word for word in command):
            ranks.append(process)
    return ranks


def _environment(config: Config) -> dict[str, str]:
    environment = os.environ | {STARTED: str(time.time() - process_age_s())}
    if config.engine.threads:
        environment["OMP_NUM_THREADS"] = str(config.engine.threads)
    # Idle OpenMP threads that spin would take the other ranks' cores.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not has_gpu():
        # On a CPU the launcher counts NUMA nodes as devices unless told.
        environment["LOCAL_SIZE"] = str(config.engine.ranks)
    return environment


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
