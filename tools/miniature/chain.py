"""The chain of all stages in miniature: each starts from the export of the one before.

What they made is asked when all are trained: no stage depends on answers, and two processes side by side use two cores
better than one with two threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.miniature.claims import CONTROL
from tools.miniature.tasks import CONVERSATIONS, READING
from tools.stages import REPOSITORY, Stage, megablip, module

RECIPES = REPOSITORY / "megablip" / "recipes" / "mini"
STAGES = ("pretrain", "sft", "interleave", "dpo", "safety")

SKILLS = tuple(task for task in CONVERSATIONS if not task.startswith(("unsafe", "marked")))

# Each is asked what it was tuned for and what it might have lost. A pre-trained model knows no conversations; the later
# ones are not asked to go on with captions, which takes longest.
ASKED = {
    "pretrain": (*READING, "shots"),
    "sft": SKILLS,
    "interleave": SKILLS,
    "dpo": CONVERSATIONS,
    "safety": CONVERSATIONS,
    CONTROL: ("smudged", "clean"),
}

# Overrides of the recipe of dpo that make the control: the same adapters tuned on the chosen answers as conversations.
# Half a sequence holds as many conversations as a sequence pairs, so a step sees as many pictures.
CHOSEN_ALONE = ["stage=sft", "data.sources.0.schema=conversation", "data.sequence_length=192", "data.max_tiles=18"]


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


FULL = Size(1.0, 2000, 2400, 500, {stage: [] for stage in STAGES})
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
    """Overrides that let a recipe of recipes/mini read the miniature's shards.

    Pre-training shares its recipe with the demo, which reads shorter documents of other shares.
    """
    kinds = {
        "pretrain": ("ocr", "caption", "interleaved", "text"),
        "sft": ("single",),
        "interleave": ("several", "single"),
        "safety": ("safety", "single", "several"),
    }[stage]
    overrides = [f"data.sources.{number}.shards={train}/{kind}-*.tar" for number, kind in enumerate(kinds)]
    if stage == "pretrain":
        # The longest interleaved document has nine pairs: 430 tokens.
        overrides += ["data.sequence_length=448", "data.sources.0.weight=7", "data.sources.2.weight=3"]
        overrides += ["data.sources.1.weight=2", "duration=4.2M tokens"]
    return overrides


def stages(folder: Path, size: Size, seed: int, split: str = "test") -> list[Stage]:
    """The commands, in order.

    Args:
        split: held-out digits that the questions are drawn with: "test", or "validation" to choose settings, whose
            answers and report then have it in their names.
    """
    suffix = "" if split == "test" else f"_{split}"
    data, model = folder / "data", folder / "start"
    model_yaml = RECIPES / "model.yaml"
    chain = [*parts(folder, size, seed), Stage("start", model, start(folder, model, model_yaml, seed), (model_yaml,))]
    for stage in STAGES:
        if stage == "dpo":
            pairs = folder / "pairs"
            chain.append(Stage("pairs", pairs, module("tools.miniature.pairs", model, "--out", pairs,
                                                      "--questions", size.pairs, "--seed", seed)))  # fmt: skip
        shards = [f"data.sources.0.shards={pairs}/*.tar"] if stage == "dpo" else sources(stage, data / "train")
        if stage == "safety":
            shards.append(f"data.sources.3.shards={pairs}/*.tar")
        arguments = [f"model.path={model}", f"seed={seed + 1}", *shards, *size.overrides[stage]]
        if stage == "dpo":
            chain += trained(folder / CONTROL, RECIPES / "dpo.yaml", [*arguments, *CHOSEN_ALONE])
        chain += trained(folder / stage, RECIPES / f"{stage}.yaml", arguments)
        model = folder / f"{stage}_model"
    for number, (name, tasks) in enumerate(ASKED.items()):
        answers, questions = folder / f"{name}_answers{suffix}", [word for task in tasks for word in ("--task", task)]
        command = module("tools.miniature.asking", folder / f"{name}_model", data / split, "--out", answers,
                         "--limit", size.items, "--threads", 1, *questions)  # fmt: skip
        chain.append(Stage(f"{name}: ask{suffix}", answers, command, beside=number % 2 == 0))
    report = folder / f"report{suffix}"
    command = module("tools.miniature.report", folder, "--split", split, "--out", report)
    return [*chain, Stage(report.name, report, command)]


def parts(folder: Path, size: Size, seed: int) -> list[Stage]:
    """Tower, data and tokenizer, in folders of those names."""
    tower, data, tokenizer = (folder / name for name in ("tower", "data", "tokenizer"))
    return [
        Stage("tower", tower, module("tools.tower", "--out", tower, "--steps", size.tower_steps, "--seed", seed),
              beside=True),
        Stage("data", data, module("tools.miniature.shards", "--out", data, "--size", size.data, "--seed", seed),
              reads=tuple(Path(__file__).with_name(f"{name}.py") for name in ("shards", "tasks", "pictures"))),
        Stage("tokenizer", tokenizer, module("tokenization", "train", "--input", data / "corpus.txt",
                                             "--vocab-size", 420, "--chat", "--out", tokenizer)),
    ]  # fmt: skip


def start(folder: Path, model: Path, model_yaml: Path, seed: int) -> list[str]:
    """The command that makes a model to start from out of the parts in `folder`."""
    return megablip("convert", "init", model, "--tower", folder / "tower", "--tokenizer", folder / "tokenizer",
                    "--model", model_yaml, "--seed", seed)  # fmt: skip


def trained(run: Path, recipe: Path, arguments: list[str]) -> list[Stage]:
    """Train by a recipe in the folder `run`, and export to `run`_model."""
    export = run.with_name(f"{run.name}_model")
    return [
        Stage(run.name, run, megablip("train", recipe, f"run_dir={run}", *arguments), reads=(recipe,)),
        Stage(f"{run.name}: convert", export, megablip("convert", "zero-to-hf", run, export)),
    ]
