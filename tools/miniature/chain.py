"""The chain of all stages in miniature: each starts from the export of the one before, and all are asked the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.miniature.claims import CONTROL
from tools.miniature.tasks import CONVERSATIONS, READING
from tools.stages import REPOSITORY, Stage, megablip, module

RECIPES = REPOSITORY / "megablip" / "recipes" / "mini"
STAGES = ("pretrain", "sft", "interleave", "dpo", "safety")

# A pre-trained model knows no conversations; the later ones are not asked to go on with captions, which takes longest.
ASKED = dict.fromkeys(STAGES, (*READING, *CONVERSATIONS)) | {
    "pretrain": (*READING, "shots"),
    CONTROL: ("smudged", "clean"),
}


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
        overrides += ["duration=3.6M tokens"]
    return overrides


def stages(folder: Path, size: Size, seed: int, split: str = "test") -> list[Stage]:
    """The commands, in order.

    Args:
        split: held-out digits that the questions are drawn with: "test", or "validation" to choose settings.
    """
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
        shards = [f"data.sources.0.shards={pairs}/*.tar"] if stage == "dpo" else sources(stage, data / "train")
        arguments = [f"seed={seed + 1}", *shards, *size.overrides[stage]]
        questions = data / split, size.items
        if stage == "dpo":
            # Half a sequence has as many conversations as a sequence has pairs, so its steps see as many pictures.
            chosen = [
                "stage=sft",
                "data.sources.0.schema=conversation",
                "data.sequence_length=192",
                "data.max_tiles=18",
            ]
            chain += trained_and_asked(folder, CONTROL, "dpo", model, [*arguments, *chosen], *questions)
        chain += trained_and_asked(folder, stage, stage, model, arguments, *questions)
        model = folder / f"{stage}_model"
    report = folder / "report"
    command = module("tools.miniature.report", folder, "--split", split, "--out", report)
    return [*chain, Stage("report", report, command)]


def trained_and_asked(
    folder: Path, name: str, recipe: str, model: Path, arguments: list[str], questions: Path, items: int
) -> list[Stage]:
    """Train `model` by a recipe, export it, and put its tasks' questions to it."""
    path, run, export, answers = (
        RECIPES / f"{recipe}.yaml",
        *(folder / f"{name}{end}" for end in ("", "_model", "_answers")),
    )
    tasks = [word for task in ASKED[name] for word in ("--task", task)]
    return [
        Stage(name, run, megablip("train", path, f"run_dir={run}", f"model.path={model}", *arguments), reads=(path,)),
        Stage(f"{name}: convert", export, megablip("convert", "zero-to-hf", run, export)),
        Stage(f"{name}: ask", answers, module("tools.miniature.asking", export, questions, "--out", answers,
                                              "--limit", items, *tasks)),
    ]  # fmt: skip
