"""The main job from end to end, on a machine without a GPU.

    python -m tools.demo            about nine minutes on two cores
    python -m tools.demo --hello    the same path at its smallest

Each stage is one of megablip's own commands, printed before it runs.  A stage
whose output is there is not run again, so an interrupted demo goes on where it
was: inside the training too, from its newest committed checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.stages import REPOSITORY, Chain, Stage, megablip, module

RECIPES = REPOSITORY / "megablip" / "recipes" / "mini"


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
            reads=(RECIPES / "model.yaml",),
        ),
        Stage(
            "train",
            run,
            megablip("train", RECIPES / "pretrain.yaml", f"run_dir={run}", f"model.path={start}")
            + sources
            + [f"held_out.sources=[{held_out}]"]
            + size.overrides,
            reads=(RECIPES / "pretrain.yaml",),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hello", action="store_true", help="one rank and two minutes: see that all works")
    parser.add_argument("--folder", type=Path, help="where everything goes (default: runs/demo or runs/hello)")
    arguments = parser.parse_args()
    size = HELLO if arguments.hello else DEMO
    folder = (arguments.folder or Path("runs") / size.name).resolve()
    demo = Chain(folder)
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
