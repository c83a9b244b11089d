"""The chain of all stages in miniature: each starts from the export of the one before, and all are asked the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.stages import REPOSITORY, Stage, megablip, module

RECIPES = REPOSITORY / "megablip" / "recipes" / "mini"
STAGES = ("pretrain", "sft", "interleave", "dpo", "safety")


@dataclass(frozen=True)
class Size:
    """What differs between the miniature and its smallest form.

    Attributes:
        data: of the training data, relative to the miniature's.
        pairs: questions to draw answers for.
        items: of each held-out task.
        overrides: of each stage's recipe.
    """

    data: float
    tower_steps: int
    pairs: int
    items: int
    overrides: dict[str, list[str]]


FULL = Size(1.0, 1500, 2400, 500, {stage: [] for stage in STAGES})
TINY = Size(
    0.03,
    40,
    200,
    8,
    {
        stage: ["duration=6 steps", "checkpoint.every_steps=100", "optimizer.warmup=2 steps", "engine.ranks=1"]
        for stage in STAGES
    },
)


def sources(stage: str, train: Path) -> list[str]:
    """Overrides that let a recipe of recipes/mini read the miniature's shards."""
    kinds = {
        "pretrain": ("ocr", "caption", "interleaved", "text"),
        "sft": ("single",),
        "interleave": ("several", "single"),
        "safety": ("safety", "single", "several"),
    }[stage]
    overrides = [f"data.sources.{number}.shards={train}/{kind}-*.tar" for number, kind in enumerate(kinds)]
    if stage == "pretrain":
        # The longest interleaved document has nine pairs: 430 tokens.
        overrides += ["data.sequence_length=448", "data.sources.0.weight=6", "data.sources.2.weight=4"]
    return overrides


def stages(folder: Path, size: Size, seed: int) -> list[Stage]:
    """The commands, in order."""
    data, tower, tokenizer, start = (folder / name for name in ("data", "tower", "tokenizer", "start"))
    chain = [
        Stage("tower", tower, module("tools.tower", "--out", tower, "--steps", size.tower_steps, "--seed", seed),
              beside=True),
        Stage("data", data, module("tools.miniature.shards", "--out", data, "--size", size.data, "--seed", seed)),
        Stage("tokenizer", tokenizer, module("tokenization", "train", "--input", data / "corpus.txt",
                                             "--vocab-size", 420, "--chat", "--out", tokenizer)),
        Stage("start", start, megablip("convert", "init", start, "--tower", tower, "--tokenizer", tokenizer,
                                       "--model", RECIPES / "model.yaml", "--seed", seed),
              reads=(RECIPES / "model.yaml",)),
    ]  # fmt: skip
    model = start
    for stage in STAGES:
        if stage == "dpo":
            pairs = folder / "pairs"
            chain.append(Stage("pairs", pairs, module("tools.miniature.pairs", model, "--out", pairs,
                                                      "--questions", size.pairs, "--seed", seed)))  # fmt: skip
        recipe, run, export = RECIPES / f"{stage}.yaml", folder / stage, folder / f"{stage}_model"
        command = megablip("train", recipe, f"run_dir={run}", f"model.path={model}", f"seed={seed + 1}")
        shards = [f"data.sources.0.shards={pairs}/*.tar"] if stage == "dpo" else sources(stage, data / "train")
        chain.append(Stage(stage, run, [*command, *shards, *size.overrides[stage]], reads=(recipe,)))
        chain.append(Stage(f"{stage}: convert", export, megablip("convert", "zero-to-hf", run, export)))
        answers = folder / f"{stage}_answers"
        chain.append(Stage(f"{stage}: ask", answers, module("tools.miniature.asking", export, data / "test", "--out",
                                                            answers, "--limit", size.items)))  # fmt: skip
        model = export
    report = folder / "report"
    return [*chain, Stage("report", report, module("tools.miniature.report", folder, "--out", report))]
