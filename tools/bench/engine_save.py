"""What a checkpoint costs the loop: saved beside training, and at once with all ranks waiting.

One rank with one thread, 101 million parameters in fp32 under ZeRO-3, so 1.2 GB a
save; the thread that writes finds a second core free, as it does beside a GPU.
The stall is what the steps from the copy to the commit take longer together
than as many steps without a save: the copy itself, and what writing takes from
training on memory, disk and the interpreter's lock.

On two idle cores the copy took 0.13 s, the stall 0.4 s, a save that all wait for 4.3 s.

    python -m tools.bench.engine_save FOLDER    the measuring process
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.core import Rival, Row

WIDTH, LAYERS, BATCH = 2048, 24, 16
PLAIN_STEPS, REPEATS = 4, 3
REPOSITORY = Path(__file__).parents[2]


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_PORT": "29431"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        seconds = json.loads(done.stdout.splitlines()[-1])
    table = Table("part", "median", "of the runs", title="a checkpoint of 1.2 GB")
    for name, values in seconds.items():
        runs = " ".join(f"{value:.3f}" for value in values)
        table.add_row(name, f"{statistics.median(values):.3f} s", runs)
    Console().print(table)
    stall, blocking = statistics.median(seconds["stall"]), statistics.median(seconds["blocking save"])
    return [Row("save_stall", stall, "s", "lower", goal=4.0, rival=Rival("all ranks wait", blocking))]


def measure(folder: Path) -> dict[str, list[float]]:
    """Seconds of each repetition; the two ways of saving take turns."""
    import torch
    from torch import nn

    from megablip.checkpoint.commit import CheckpointStore
    from megablip.checkpoint.saver import Saver
    from megablip.checkpoint.slices import write_slices
    from megablip.config import parse_config
    from megablip.engine.ds_config import complete_ds_config
    from megablip.engine.progress import Progress
    from megablip.engine.rng import rng_states
    from megablip.engine.symmetry import StepReport, StepReports, exchange
    from megablip.engine.topology import init_distributed
    from megablip.engine.zero import ZeroEngine

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def initial(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        return torch.randn(end - start) / WIDTH**0.5

    config = parse_config(_recipe(folder), where="bench")
    topology = init_distributed(timeout_s=60, threads=1)
    ds_config = complete_ds_config(config.engine, clip_norm=1.0, micro_batches=1, topology=topology)
    engine = ZeroEngine(build, ds_config, config.optimizer, topology)
    engine.load(initial, moments=False)
    progress, batch = Progress(), torch.randn(BATCH, WIDTH)
    store = CheckpointStore(folder / "checkpoints", 2, topology)
    saver = Saver(config, store, engine, progress, topology, {}, lambda text: None)

    def step() -> StepReports:
        reports = exchange(StepReport(step=progress.step, micro_batches=1, **saver.report()), topology)
        engine.backward(engine(batch).float().square().mean())
        engine.step({"decoder": 1e-4})
        progress.step += 1
        return reports

    def steps(save: bool) -> tuple[float, int]:
        """Seconds and number of the steps from a save to its commit, or of PLAIN_STEPS without one."""
        began, count = time.perf_counter(), 0
        while count < PLAIN_STEPS or saver.scalars()["checkpoint/in_flight"]:
            total = step().total
            saver.maybe_save(replace(total, save_due=int(save and count == 0)), {})
            if save and count == 0:
                found["copy"].append(saver.scalars()["checkpoint/stall_s"])
            count += 1
        return time.perf_counter() - began, count

    def save_at_once() -> float:
        began = time.perf_counter()
        store.save(progress.step, lambda path: write_slices(path, engine.local_slices(), rng_states()), {}, {})
        return time.perf_counter() - began

    found: dict[str, list[float]] = {name: [] for name in ("step", "copy", "stall", "blocking save")}
    steps(save=True)  # the first step makes the moments, the first copy its memory
    found["copy"].clear()
    for _ in range(REPEATS):
        plain_s, count = steps(save=False)
        found["step"].append(plain_s / count)
        seconds, count = steps(save=True)
        found["stall"].append(seconds - count * found["step"][-1])
        found["blocking save"].append(save_at_once())
        shutil.rmtree(folder / "checkpoints")
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    """As far as the engine and the saver look at one; no step is due by its number."""
    return {
        "stage": "pretrain", "run_dir": str(folder), "duration": "1000 steps", "model": {"path": str(folder)},
        "data": {
            "sources": [{"name": "none", "shards": "none.tar", "schema": "text", "weight": 1}],
            "sequence_length": 1, "max_tiles": 1,
        },
        "batch": {"lanes": 1},
        "optimizer": {"lr": 1e-4},
        "engine": {"precision": "fp32", "threads": 1},
        "checkpoint": {"every_steps": 10**9},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))), flush=True)
    os._exit(0)  # gloo's threads now and then abort the interpreter's own exit
