"""Comparisons of the paper in miniature: one part changed, all else the same, several seeds.

    python -m tools.miniature resolution --seeds 3

Each variant is trained from scratch by the real trainer and asked the same
held-out questions; FOLDER/NAME.json holds the figures of each seed.  Printed,
and shown by a report that is made afterwards, are their mean and 95 % interval,
and the differences that the claim is about, taken seed by seed.  The chain and
all comparisons of a seed share its tower and data.  Two variants train side by
side, one rank each: that is a third faster than one after the other on two ranks.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tools.miniature.chain import FULL, RECIPES, Size, parts, sources, start, trained
from tools.stages import Chain, Stage, module

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

    def folder(self, seed: Path, ablation: str) -> Path:
        """Where all of it lies, in the folder of a seed."""
        return seed / ablation / self.name.replace(" ", "_").replace(",", "")


@dataclass(frozen=True)
class Contrast:
    """A figure of one variant less that of another.

    Attributes:
        at_least: what the median over the seeds is to be; None: it is only told.
    """

    figure: str
    one: str
    other: str
    at_least: float | None = None

    def values(self, seeds: list[dict[str, dict[str, float]]]) -> list[float]:
        """The difference with each seed, from {variant: {figure: value}} of each."""
        return [found[self.one][self.figure] - found[self.other][self.figure] for found in seeds]


@dataclass(frozen=True)
class Ablation:
    """Variants, what they are asked, and the claim of the paper that they are about."""

    claim: str
    variants: tuple[Variant, ...]
    figures: tuple[str, ...]
    tasks: tuple[str, ...]
    contrasts: tuple[Contrast, ...]


def _reading(tokens: str) -> tuple[str, ...]:
    """Text-rich pictures alone, in so many tokens.

    Tokens are chosen for equal compute, about 300 core-seconds: the fewer visual tokens a picture has, the more
    pictures, and so the more work of the tower, are in a number of tokens.
    """
    weights = (f"data.sources.{source}.weight={weight}" for source, weight in enumerate((7, 0.01, 0.01, 0.1)))
    return (f"duration={tokens} tokens", *weights)


_LONG_TEXTS = ("ocr_three_tiles", "ocr_straddling")
_DIGITS, _STRADDLING = "ocr_three_tiles: digits", "ocr_straddling: digits"
_READ_FIGURES = (_DIGITS, "ocr_three_tiles", _STRADDLING)
_ASKED = ("read", "largest", "count", "stamp")
_SCALES = ("300k", "600k", "1.3M", "2.6M")

ABLATIONS = {
    "resolution": Ablation(
        "any resolution, tile by tile, beats fixed sampling and fixed resolution on text-rich images",
        (
            Variant("any resolution", {}, _reading("1.5M")),
            Variant("fixed sampling", {"sampler": {"kind": "fixed", "num_latents": 10}}, _reading("900k")),
            Variant("fixed sampling, 40 tokens", {"sampler": {"kind": "fixed", "num_latents": 40}}, _reading("1.5M")),
            Variant("fixed resolution", {"grids": []}, _reading("1.7M")),
        ),
        _READ_FIGURES,
        _LONG_TEXTS,
        (
            Contrast(_DIGITS, "any resolution", "fixed sampling", 0.10),
            Contrast(_DIGITS, "any resolution", "fixed sampling, 40 tokens", 0.10),
            Contrast(_DIGITS, "any resolution", "fixed resolution", 0.50),
            Contrast(_STRADDLING, "any resolution", "fixed sampling"),
        ),
    ),
    "data_scale": Ablation(
        "more tokens help, with diminishing returns",
        tuple(Variant(tokens, {}, (f"duration={tokens} tokens",)) for tokens in _SCALES),
        ("ocr_one_tile", _DIGITS, "shots 4"),
        ("ocr_one_tile", "ocr_three_tiles", "shots"),
        tuple(
            Contrast(figure, more, fewer, 0.0)
            for figure in ("ocr_one_tile", _DIGITS, "shots 4")
            for fewer, more in pairwise(_SCALES)
        ),
    ),
    "text_diversity": Ablation(
        "documents rich in text help reading, and little else",
        (
            Variant("with OCR documents", {}, ("duration=1.3M tokens",)),
            Variant("without", {}, ("duration=1.3M tokens", "data.sources.0.weight=0.01")),
        ),
        ("ocr_one_tile", _DIGITS, "shots 4"),
        ("ocr_one_tile", "ocr_three_tiles", "shots"),
        (
            Contrast("ocr_one_tile", "with OCR documents", "without", 0.0),
            Contrast(_DIGITS, "with OCR documents", "without", 0.0),
            Contrast("shots 4", "with OCR documents", "without"),
        ),
    ),
    "instruction": Ablation(
        "a sampler that reads the instruction changes little",
        (
            Variant("perceiver", {}, ("duration=1.3M tokens",), tune=True),
            Variant("instruction-aware", {"sampler": {"kind": "instruct"}}, ("duration=1.3M tokens",), tune=True),
        ),
        _ASKED,
        _ASKED,
        tuple(Contrast(figure, "instruction-aware", "perceiver") for figure in _ASKED),
    ),
}


def stages(folder: Path, name: str, seed: int, size: Size = FULL) -> list[Stage]:
    """The commands of one seed, in order: parts that all variants share, then variants, two side by side."""
    settings = yaml.safe_load((RECIPES / "model.yaml").read_text())
    chain = parts(folder, size, seed)
    lanes = [_variant(folder, name, variant, settings, seed, size) for variant in ABLATIONS[name].variants]
    for one, other in zip(lanes[::2], lanes[1::2], strict=True):
        for left, right in zip(one, other, strict=True):
            chain += [replace(left, beside=True), right]
    return chain


def _variant(folder: Path, name: str, variant: Variant, settings: dict[str, Any], seed: int, size: Size) -> list[Stage]:
    """Start, train, export and ask one variant."""
    ablation, own, data = ABLATIONS[name], variant.folder(folder, name), folder / "data"
    own.mkdir(parents=True, exist_ok=True)
    changed = settings | {key: value for key, value in variant.model.items() if key != "sampler"}
    changed["sampler"] = settings["sampler"] | variant.model.get("sampler", {})
    model_yaml = own / "model.yaml"
    model_yaml.write_text(yaml.safe_dump(changed))
    model = own / "start"
    found = [Stage("start", model, start(folder, model, model_yaml, seed), reads=(model_yaml,))]
    for stage in ("pretrain", "sft") if variant.tune else ("pretrain",):
        overrides = [*sources(stage, data / "train"), *(variant.overrides if stage == "pretrain" else ())]
        arguments = [f"model.path={model}", f"seed={seed + 1}", *overrides, *size.overrides[stage], "engine.ranks=1"]
        found += trained(own / stage, RECIPES / f"{stage}.yaml", arguments)
        model = own / f"{stage}_model"
    asked = [word for task in ablation.tasks for word in ("--task", task)]
    found.append(Stage("ask", own / "answers", module(
        "tools.miniature.asking", model, data / "test", "--out", own / "answers", "--limit", size.items,
        "--threads", 1, *asked,
    )))  # fmt: skip
    return [replace(stage, name=f"{name}: {variant.name}: {stage.name}") for stage in found]


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; of one value the half is not known: nan."""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), _T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


@dataclass(frozen=True)
class Compared:
    """What a comparison found, as the cells of two tables.

    Attributes:
        variants: name, and mean with interval of each of `figures`.
        differences: cells under DIFFERENCES.
    """

    claim: str
    seeds: int
    figures: tuple[str, ...]
    variants: list[tuple[str, ...]]
    differences: list[tuple[str, ...]]

    @classmethod
    def read(cls, name: str, folder: Path) -> Compared | None:
        """None where the comparison has not been run."""
        file, ablation = folder / f"{name}.json", ABLATIONS[name]
        if not file.is_file():
            return None
        by_seed = json.loads(file.read_text(encoding="utf-8"))["seeds"]
        return cls(
            ablation.claim,
            len(by_seed),
            ablation.figures,
            [
                (
                    variant.name,
                    *(_interval([found[variant.name][figure] for found in by_seed]) for figure in ablation.figures),
                )
                for variant in ablation.variants
            ],
            [_difference(contrast, by_seed) for contrast in ablation.contrasts],
        )


DIFFERENCES = ("figure", "of", "less that of", "median", "mean", "goal", "reached", "each seed")


def run_ablation(name: str, folder: Path, seeds: int, size: Size) -> None:
    """Train and ask all variants with each seed; print the tables."""
    ablation = ABLATIONS[name]
    by_seed: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        home = folder / f"seed_{seed}"
        Chain(home).run(stages(home, name, seed, size))
        answers = {variant.name: variant.folder(home, name) / "answers" for variant in ablation.variants}
        by_seed.append({variant: json.loads((at / "figures.json").read_text()) for variant, at in answers.items()})
    (folder / f"{name}.json").write_text(json.dumps({"claim": ablation.claim, "seeds": by_seed}, indent=1))
    compared = Compared.read(name, folder)
    variants = Table("variant", *compared.figures, title=f"{compared.claim} (seeds: {compared.seeds})")
    differences = Table(*DIFFERENCES)
    for table, rows in ((variants, compared.variants), (differences, compared.differences)):
        for row in rows:
            table.add_row(*row)
    Console().print(variants, differences)


def _difference(contrast: Contrast, by_seed: list[dict[str, dict[str, float]]]) -> tuple[str, ...]:
    values, goal = contrast.values(by_seed), contrast.at_least
    median = statistics.median(values)
    judged = ("", "") if goal is None else (f">= {goal:.2f}", "yes" if median >= goal else "no")
    each = ", ".join(f"{value:+.3f}" for value in values)
    return contrast.figure, contrast.one, contrast.other, f"{median:+.3f}", _interval(values), *judged, each


def _interval(values: list[float]) -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
