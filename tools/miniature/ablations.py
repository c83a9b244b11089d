"""Comparisons of the paper in miniature: one part changed, all else the same, several seeds.

    python -m tools.miniature resolution --seeds 3

Each variant is trained from scratch by the real trainer and asked the same
held-out questions; FOLDER/NAME/results.json holds the figures of each seed, and
the table that is printed their mean and 95 % interval.  A variant takes two to
six minutes on two cores.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tools.miniature.chain import FULL, RECIPES, sources
from tools.stages import Chain, Stage, megablip, module

# Student's t for a two-sided 95 % interval, by the number of seeds.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Variant:
    """What differs from the miniature.

    Attributes:
        model: keys of recipes/mini/model.yaml.
        overrides: of recipes/mini/pretrain.yaml.
        tune: go through fine-tuning too.
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    tune: bool = False

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace(",", "")


@dataclass(frozen=True)
class Ablation:
    """Variants, what they are asked, and the claim of the paper that they are about."""

    claim: str
    variants: tuple[Variant, ...]
    figures: tuple[str, ...]
    tasks: tuple[str, ...]


# Text-rich pictures alone, and equal tokens seen by all: about 100 core-seconds each.
_READING = (
    "duration=900k tokens",
    "data.sources.1.weight=0.01",
    "data.sources.2.weight=0.01",
    "data.sources.3.weight=0.1",
)
_LONG_TEXTS = ("ocr_three_tiles", "ocr_straddling")
_READ_FIGURES = ("ocr_three_tiles: digits", "ocr_three_tiles", "ocr_straddling: digits")

ABLATIONS = {
    "resolution": Ablation(
        "any resolution, tile by tile, beats fixed sampling and fixed resolution on text-rich images",
        (
            Variant("any resolution", {}, _READING),
            Variant("fixed sampling", {"sampler": {"kind": "fixed", "num_latents": 10}}, _READING),
            Variant("fixed sampling, 40 tokens", {"sampler": {"kind": "fixed", "num_latents": 40}}, _READING),
            Variant("fixed resolution", {"grids": []}, _READING),
        ),
        _READ_FIGURES,
        _LONG_TEXTS,
    ),
    "data_scale": Ablation(
        "more tokens help, with diminishing returns",
        tuple(Variant(tokens, {}, (f"duration={tokens} tokens",)) for tokens in ("300k", "600k", "1.3M", "2.6M")),
        ("ocr_one_tile", "ocr_three_tiles: digits", "shots 4"),
        ("ocr_one_tile", "ocr_three_tiles", "shots"),
    ),
    "text_diversity": Ablation(
        "documents rich in text help reading, and little else",
        (
            Variant("with OCR documents", {}, ("duration=1.3M tokens",)),
            Variant("without", {}, ("duration=1.3M tokens", "data.sources.0.weight=0.01")),
        ),
        ("ocr_one_tile", "ocr_three_tiles: digits", "shots 4"),
        ("ocr_one_tile", "ocr_three_tiles", "shots"),
    ),
    "instruction": Ablation(
        "a sampler that reads the instruction changes little",
        (
            Variant("perceiver", {}, ("duration=1.3M tokens",), tune=True),
            Variant("instruction-aware", {"sampler": {"kind": "instruct"}}, ("duration=1.3M tokens",), tune=True),
        ),
        ("read", "largest", "count", "stamp"),
        ("read", "largest", "count", "stamp"),
    ),
}


def stages(folder: Path, ablation: Ablation, seed: int) -> list[Stage]:
    """The commands of one seed, in order: parts that all variants share, then variant after variant."""
    data, tower, tokenizer = (folder / name for name in ("data", "tower", "tokenizer"))
    chain = [
        Stage("tower", tower, module("tools.tower", "--out", tower, "--steps", FULL.tower_steps, "--seed", seed),
              beside=True),
        Stage("data", data, module("tools.miniature.shards", "--out", data, "--seed", seed)),
        Stage("tokenizer", tokenizer, module("tokenization", "train", "--input", data / "corpus.txt",
                                             "--vocab-size", 420, "--chat", "--out", tokenizer)),
    ]  # fmt: skip
    settings = yaml.safe_load((RECIPES / "model.yaml").read_text())
    for variant in ablation.variants:
        own = folder / variant.folder
        own.mkdir(parents=True, exist_ok=True)
        changed = settings | {key: value for key, value in variant.model.items() if key != "sampler"}
        changed["sampler"] = settings["sampler"] | variant.model.get("sampler", {})
        model_yaml, model = own / "model.yaml", own / "start"
        model_yaml.write_text(yaml.safe_dump(changed))
        chain.append(Stage(f"{variant.name}: start", model, megablip(
            "convert", "init", model, "--tower", tower, "--tokenizer", tokenizer, "--model", model_yaml, "--seed", seed,
        ), reads=(model_yaml,)))  # fmt: skip
        for stage in ("pretrain", "sft") if variant.tune else ("pretrain",):
            recipe, run, export = RECIPES / f"{stage}.yaml", own / stage, own / f"{stage}_model"
            overrides = [*sources(stage, data / "train"), *(variant.overrides if stage == "pretrain" else ())]
            chain += [
                Stage(f"{variant.name}: {stage}", run, megablip(
                    "train", recipe, f"run_dir={run}", f"model.path={model}", f"seed={seed + 1}", *overrides,
                ), reads=(recipe,)),
                Stage(f"{variant.name}: {stage}: convert", export, megablip("convert", "zero-to-hf", run, export)),
            ]  # fmt: skip
            model = export
        asked = [word for task in ablation.tasks for word in ("--task", task)]
        answers = own / "answers"
        chain.append(Stage(f"{variant.name}: ask", answers, module(
            "tools.miniature.asking", model, data / "test", "--out", answers, *asked,
        )))  # fmt: skip
    return chain


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; of one value the half is not known: nan."""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), _T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def run_ablation(name: str, folder: Path, seeds: int) -> None:
    """Train and ask all variants with each seed; print the table."""
    ablation = ABLATIONS[name]
    by_seed: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        home = folder / f"seed_{seed}"
        Chain(home).run(stages(home, ablation, seed))
        found = {}
        for variant in ablation.variants:
            found[variant.name] = json.loads((home / variant.folder / "answers" / "figures.json").read_text())
        by_seed.append(found)
    (folder / "results.json").write_text(json.dumps({"claim": ablation.claim, "seeds": by_seed}, indent=1))
    table = Table("variant", *ablation.figures, title=f"{ablation.claim} ({seeds} seeds)")
    for variant in ablation.variants:
        cells = []
        for figure in ablation.figures:
            mean, half = mean_and_half_width([found[variant.name][figure] for found in by_seed])
            cells.append(f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}"))
        table.add_row(variant.name, *cells)
    Console().print(table)
