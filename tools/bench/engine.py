"""A run at the demo's size: what the loop costs around the model, what starting costs, what a save holds up.

Real runs of `megablip train` over the demo's recipe: two ranks, ZeRO-3, bf16.
The vision tower is random, which changes no time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megablip.metrics.points import read_metrics
from tools.bench import engine_save
from tools.bench.core import Row
from tools.demo import RECIPES, REPOSITORY

STEPS, WARM_UP_STEPS = 60, 10
STARTS = 3
DOCUMENTS = 6000  # enough that no source is read twice
MODEL_PARTS = ("vision", "forward", "backward", "optimizer")


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_start(folder)
        train(folder, "first", 2)  # what is compiled or indexed once is, after it
        starts = [first_step(train(folder, f"start-{number}", 2)) for number in range(STARTS)]
        median_start = sorted(starts, key=lambda laps: sum(laps.values()))[STARTS // 2]
        show("from the command to the end of the first step", median_start)
        parts = split_of(read_metrics(train(folder, "long", STEPS)))
        show("a step, in the median", parts)
        return [
            Row("loop_overhead_share", overhead_share(parts), "", "lower", goal=0.05),
            Row("start_to_first_step", sum(median_start.values()), "s", "lower", goal=15),
            *engine_save.rows(),
        ]


def split_of(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of each part in the median step, those for warming up left out."""
    warm = [point for point in points if point["step"] > WARM_UP_STEPS]
    names = sorted({name for point in warm for name in point if name.startswith("time/") and name != "time/step_s"})
    return {name[5:-2]: statistics.median(point.get(name, 0.0) for point in warm) for name in names}


def overhead_share(parts: Mapping[str, float]) -> float:
    """Share of a step, with data ready, that passes outside the model's forward, backward and optimizer."""
    ready = sum(seconds for name, seconds in parts.items() if name != "data_wait")
    return 1 - sum(parts[name] for name in MODEL_PARTS) / ready


def first_step(run_dir: Path) -> dict[str, float]:
    """Seconds of each lap from the command to the end of the first step."""
    point = read_metrics(run_dir)[0]
    return {name[6:-2].replace("_", " "): float(value) for name, value in point.items() if name.startswith("start/")}


def make_start(folder: Path) -> None:
    """folder/start: the demo's model with a random tower; folder/data: its shards."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from tools.tower import CONFIG

    SiglipVisionModel(SiglipVisionConfig(**CONFIG)).save_pretrained(folder / "tower")
    data, tokenizer, model = folder / "data", folder / "tokenizer", RECIPES / "model.yaml"
    call("tools.demo_shards", "--out", data, "--documents", DOCUMENTS)
    call("tokenization", "train", "--input", data / "corpus.txt", "--vocab-size", 400, "--out", tokenizer)
    call(
        "megablip.cli", "convert", "init", folder / "start", "--tower", folder / "tower", "--tokenizer", tokenizer,
        "--model", model,
    )  # fmt: skip


def train(folder: Path, name: str, steps: int) -> Path:
    """Run the demo's recipe for so many steps; its run directory."""
    run_dir = folder / name
    kinds = ("ocr", "caption", "interleaved", "text")
    sources = [f"data.sources.{n}.shards={folder}/data/train/{kind}-*.tar" for n, kind in enumerate(kinds)]
    call(
        "megablip.cli", "train", RECIPES / "pretrain.yaml", f"run_dir={run_dir}", f"model.path={folder / 'start'}",
        f"duration={steps} steps", "checkpoint.every_steps=100000", *sources,
    )  # fmt: skip
    return run_dir


def call(*arguments: object) -> None:
    """Run a module of this checkout; RuntimeError with its output if it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    # Their own number of threads, not this process's.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def show(title: str, parts: Mapping[str, float]) -> None:
    """Print a split, largest part first."""
    total = sum(parts.values())
    table = Table("part", "seconds", "share", title=title)
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.4g}", f"{seconds / total:.1%}")
    table.add_row("together", f"{total:.4g}", "")
    Console().print(table)
