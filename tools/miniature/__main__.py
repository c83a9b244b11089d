"""All stages of BLIP-3 in miniature, through the real trainer, each evaluated on held-out pictures.

    python -m tools.miniature                 the chain, and its report: about 25 minutes on two cores
    python -m tools.miniature --tiny          the same path at its smallest, to see that all works

An interrupted chain goes on where it was.  The report is FOLDER/report/report.html.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.stages import REPOSITORY, Chain, Stage, megablip, module

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


def stages(folder: Path, size: Size, seed: int) -> list[Stage]:
    """The commands, in order."""
    data, tower, tokenizer, start = (folder / name for name in ("data", "tower", "tokenizer", "start"))
    train = data / "train"

    def sources(*kinds: str) -> list[str]:
        return [f"data.sources.{number}.shards={train}/{kind}-*.tar" for number, kind in enumerate(kinds)]

    data_of = {
        # The longest interleaved document has nine pairs: 430 tokens.
        "pretrain": [*sources("ocr", "caption", "interleaved", "text"), "data.sequence_length=448",
                     "data.sources.0.weight=6", "data.sources.2.weight=4"],
        "sft": sources("single"),
        "interleave": sources("several", "single"),
        "dpo": [f"data.sources.0.shards={folder}/pairs/*.tar"],
        "safety": sources("safety", "single", "several"),
    }  # fmt: skip
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
        chain.append(Stage(stage, run, [*command, *data_of[stage], *size.overrides[stage]], reads=(recipe,)))
        chain.append(Stage(f"{stage}: convert", export, megablip("convert", "zero-to-hf", run, export)))
        answers = folder / f"{stage}_answers"
        chain.append(Stage(f"{stage}: ask", answers, module("tools.miniature.asking", export, data / "test", "--out",
                                                            answers, "--limit", size.items)))  # fmt: skip
        model = export
    report = folder / "report"
    return [*chain, Stage("report", report, module("tools.miniature.report", folder, "--out", report))]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="some steps of each stage: see that all works")
    parser.add_argument("--seed", type=int, default=0, help="of digits' split, pictures, weights and order of data")
    parser.add_argument("--folder", type=Path, help="where everything goes (default: runs/miniature)")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path("runs") / "miniature").resolve()
    chain = Chain(folder)
    chain.run(stages(folder, TINY if arguments.tiny else FULL, arguments.seed))
    print(f"miniature: {folder / 'report' / 'report.html'} after {chain.minutes():.1f} min")


if __name__ == "__main__":
    sys.exit(main())
