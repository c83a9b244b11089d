"""The main job from end to end, on a machine without a GPU.

    python -m tools.demo            about a quarter of an hour on two cores
    python -m tools.demo --hello    the same path at its smallest

Each stage is one of megablip's own commands, printed before it runs.  A stage
whose output is there is not run again, so an interrupted demo goes on where it
was: inside the training too, from its newest committed checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "megablip" / "recipes" / "mini"


@dataclass(frozen=True)
class Stage:
    """One command and the folder it makes. `beside` starts it together with the next stage."""

    name: str
    output: Path
    command: list[str]
    beside: bool = False


@dataclass(frozen=True)
class Size:
    """What differs between the demo and its smallest form."""

    name: str
    documents: int
    tower_steps: int
    overrides: list[str]
    images: int


DEMO = Size(
    "demo",
    documents=24_000,
    tower_steps=1500,
    overrides=["held_out.every_steps=100", "held_out.batches=4"],
    images=10_000,
)
HELLO = Size(
    "hello",
    documents=600,
    tower_steps=60,
    overrides=["engine.ranks=1", "duration=40 steps", "checkpoint.every_steps=20", "optimizer.warmup=5 steps"],
    images=1,
)


def stages(size: Size, folder: Path) -> list[Stage]:
    """The commands, in order."""

    def module(name: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", name, *map(str, arguments)]

    def megablip(*arguments: object) -> list[str]:
        return [str(Path(sys.executable).with_name("megablip")), *map(str, arguments)]

    names = ("data", "tower", "tokenizer", "start", "run", "export", "report")
    data, tower, tokenizer, start, run, export, report = (folder / name for name in names)
    sources = [
        f"data.sources.{number}.shards={data}/train/{kind}-*.tar"
        for number, kind in enumerate(["ocr", "caption", "interleaved", "text"])
    ]
    held_out = ", ".join(
        f"{{name: {kind}, shards: '{data}/validation/{kind}-*.tar', schema: {kind}, weight: 1}}"
        for kind in ("ocr", "caption")
    )
    return [
        Stage("tower", tower, module("tools.tower", "--out", tower, "--steps", size.tower_steps), beside=True),
        Stage("shards", data, module("tools.demo_shards", "--out", data, "--documents", size.documents)),
        Stage(
            "tokenizer",
            tokenizer,
            module("tokenization", "train", "--input", data / "corpus.txt", "--vocab-size", 400, "--out", tokenizer),
        ),
        Stage(
            "start",
            start,
            megablip(
                "convert", "init", start, "--tower", tower, "--tokenizer", tokenizer, "--model", RECIPES / "model.yaml"
            ),
        ),
        Stage(
            "train",
            run,
            megablip("train", RECIPES / "pretrain.yaml", f"run_dir={run}", f"model.path={start}")
            + sources
            + [f"held_out.sources=[{held_out}]"]
            + size.overrides,
        ),
        Stage("convert", export, megablip("convert", "zero-to-hf", run, export)),
        Stage(
            "eval",
            report,
            megablip(
                "eval", export, f"{data}/test/ocr-*.tar", "--output", report, "--run-dir", run, "--limit", size.images
            ),
        ),
    ]


class Demo:
    """Runs stages, remembers which are done and how long each took."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._journal = folder / "stages.json"
        self._asked_to_stop = False
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, todo: list[Stage]) -> None:
        """Raises SystemExit with the exit code of a stage that fails or stops."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        began, together = time.monotonic(), []
        upstream = "".join(path.read_text() for path in sorted(RECIPES.glob("*.yaml")))
        for stage in todo:
            # A stage counts only as long as the recipes, its command and all before it are the same.
            upstream = hashlib.sha256((upstream + shlex.join(stage.command)).encode()).hexdigest()
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
                for number, (waiting, process) in enumerate(together, 1):
                    # Stages side by side share the clock: it counts once, with the last.
                    self._finish(waiting, process, began if number == len(together) else None)
                began, together = time.monotonic(), []

    def minutes(self) -> float:
        """Time of all stages, over all attempts."""
        return sum(stage["seconds"] for stage in self._read().values()) / 60

    def _finish(self, stage: Stage, process: subprocess.Popen[bytes], began: float | None) -> None:
        code = process.wait()
        journal = self._read()
        if began is not None:
            journal[stage.name]["seconds"] += time.monotonic() - began
        journal[stage.name]["done"] = code == 0
        self._journal.write_text(json.dumps(journal, indent=1))
        if self._asked_to_stop and code != 0:
            print(f"== {stage.name}: stopped; the same command goes on from here", flush=True)
            raise SystemExit(75)
        if code != 0:
            print(f"== {stage.name}: failed with exit code {code}; mend it and start again to go on", flush=True)
            raise SystemExit(code)

    def _read(self) -> dict[str, dict]:
        try:
            return json.loads(self._journal.read_text())
        except (OSError, ValueError):
            return {}

    def _stop(self, number: int, frame: object) -> None:
        self._asked_to_stop = True
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hello", action="store_true", help="one rank and two minutes: see that all works")
    parser.add_argument("--folder", type=Path, help="where everything goes (default: runs/demo or runs/hello)")
    arguments = parser.parse_args()
    size = HELLO if arguments.hello else DEMO
    folder = (arguments.folder or Path("runs") / size.name).resolve()
    demo = Demo(folder)
    demo.run(stages(size, folder))
    results = json.loads((folder / "report" / "results.json").read_text())
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    print(f"pictures: {folder / 'report' / 'report.html'}")
    print(f"curves: {Path(sys.executable).parent}/tensorboard --logdir {folder / 'run'}")
    if arguments.hello:
        answer = results["answers"][0]
        print(f"hello: image {answer['key']} shows '{answer['truth']}', the model read '{answer['answer']}'")
    else:
        three = results["groups"]["3"]
        print(f"demo: exact match {three['exact']:.3f} on {three['items']} held-out images in {demo.minutes():.1f} min")


if __name__ == "__main__":
    main()
