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

from megablip.config import Config, dump_config, held_out_run, load_config, refuse_changes
from megablip.data.samples import index_sources
from megablip.data.shards import expand_shards
from megablip.engine.status import EXIT_CODES, RunStatus
from megablip.engine.topology import has_gpu
from megablip.errors import ConfigError
from megablip.metrics.startup import STARTED, process_age_s

RESOLVED_CONFIG = "config.yaml"


def launch(recipe: Path, overrides: list[str]) -> int:
    """Run a recipe to its end or to a stop; the exit code of `megablip train`.

    Raises:
        ConfigError, ShardError: before any rank is started.
    """
    config = load_config(recipe, overrides)
    config_path = prepare_run(config)
    index_sources(config.data)
    if held_out := held_out_run(config):
        index_sources(held_out.data)
    status = RunStatus(Path(config.run_dir))
    attempts_before = len(status.attempts)
    return_code, asked_to_stop = _run_ranks(config, config_path)
    attempts = status.attempts
    if len(attempts) == attempts_before:
        if asked_to_stop:
            print("stopped before the ranks had started")
            return EXIT_CODES["stopped"]
        print("the ranks did not start; their messages are above", file=sys.stderr)
        return EXIT_CODES["failed"]
    outcome = attempts[-1]["outcome"]
    if outcome == "running":
        # The ranks ended without a word: killed, out of memory, crashed in C.
        print(
            f"the ranks ended without a word (launcher's exit code {return_code}); start again to resume from "
            "the newest checkpoint",
            file=sys.stderr,
        )
        status.update(outcome="failed", reason=f"died without a word, launcher exit code {return_code}")
    return EXIT_CODES[outcome]


def prepare_run(config: Config) -> Path:
    """Check paths and the run directory, and write the resolved config into it.

    Raises:
        ConfigError: no model, or the directory belongs to another recipe.
        ShardError: a source without shards.
    """
    for source in config.data.sources + config.held_out.sources:
        expand_shards(source.shards)
    if not (Path(config.model.path) / "config.json").exists():
        raise ConfigError(
            "there is no model to start from",
            where=f"model.path: {config.model.path}",
            remedy="make one with `megablip convert init`, or give the folder of an export",
        )
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


def _run_ranks(config: Config, config_path: Path) -> tuple[int, bool]:
    """The launcher's exit code, and whether a signal asked to stop."""
    process = subprocess.Popen(
        launcher_command(config, config_path),
        env=_environment(config),
        start_new_session=True,  # a Ctrl-C at the terminal must not reach the launcher
    )
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        ranks = _rank_processes(process.pid)
        if len(asked) > 1 or not ranks:
            os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks:
            with suppress(psutil.Error):  # it may have ended by itself
                rank.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return process.wait(), bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rank_processes(launcher_pid: int) -> list[psutil.Process]:
    ranks = []
    for process in psutil.Process(launcher_pid).children(recursive=True):
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
