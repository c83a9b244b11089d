"""Reading text in held-out images: greedy generation, exact match."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

import megablip.model.blip3  # noqa: F401 (registers the model with transformers)
from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import ConfigError, SampleError
from megablip.evaluate.report import write_report
from megablip.metrics.board import read_metrics
from megablip.tokens import IMAGE_TOKEN, OCR_TAGS

OPEN, CLOSE = OCR_TAGS[:2]
BATCH_IMAGES = 64
PICTURES = 48  # in the report; wrong answers first
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    key: str
    truth: str
    answer: str

    @property
    def exact(self) -> bool:
        return self.truth == self.answer


def evaluate_reading(model: Path, shards: str, output: Path, run_dir: Path | None, limit: int | None) -> None:
    """Let an exported model read images of the `ocr` schema; write results.json and report.html.

    Args:
        model: folder of the export.
        shards: path, glob or braces of held-out shards.
        run_dir: run whose loss curve the report shows.
        limit: images at most.

    Raises:
        ConfigError: no model, a broken one, or an output folder that can't be made.
        ShardError, SampleError: no images, or one that can't be used.
    """
    if not (model / "config.json").exists():
        raise ConfigError("there is no model", where=str(model), remedy="export one with `megablip convert zero-to-hf`")
    samples = list(read_samples(shards, limit))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder can't be made: {error.strerror}", where=f"--output {output}") from None
    try:
        lmm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the model can't be loaded: {error}", where=str(model), remedy="copy or convert the folder again"
        ) from error
    answers = []
    for start in track(range(0, len(samples), BATCH_IMAGES), "reading images"):
        batch = samples[start : start + BATCH_IMAGES]
        texts = read_images(lmm, processor, [image for _, image, _ in batch])
        answers += [Answer(key, truth, text) for (key, _, truth), text in zip(batch, texts, strict=True)]
    by_length = summarize(answers)
    results = {
        "images": len(answers),
        "exact": sum(answer.exact for answer in answers) / len(answers),
        "by_length": by_length,
        "answers": [asdict(answer) for answer in answers],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    shown = sorted(range(len(answers)), key=lambda number: answers[number].exact)[: PICTURES // 2]
    shown += [number for number in range(len(answers)) if answers[number].exact][: PICTURES - len(shown)]
    write_report(
        output / "report.html",
        title=f"Reading held-out images: {model}",
        metrics=read_metrics(run_dir) if run_dir else [],
        by_length=by_length,
        pictures=[(samples[number][1], answers[number]) for number in shown],
    )
    table = Table("characters", "images", "exact match", "right characters")
    for length, row in by_length.items():
        table.add_row(length, str(row["images"]), f"{row['exact']:.3f}", f"{row['characters']:.3f}")
    Console().print(table)


def read_samples(shards: str, limit: int | None) -> Iterator[tuple[str, bytes, str]]:
    """(key, image, text in it) of samples in the `ocr` schema.

    Raises:
        SampleError: a sample without an image and a line of text.
    """
    config = SourceConfig(name="held-out", shards=shards, schema="ocr", weight=1)
    source = ShardSource(config.name, expand_shards(shards))
    addresses = [(shard, sample) for shard, count in enumerate(source.counts) for sample in range(count)]
    for shard, sample in addresses[:limit]:
        key, members = source.read(shard, sample)
        try:
            (document,) = SCHEMAS["ocr"](members, config, key)
        except SampleError as error:
            raise SampleError(error.what, where=f"{source.paths[shard]}, key {key}", remedy=error.remedy) from None
        image, text = document.segments
        yield key, image.data, re.match(f"{OPEN}(.*?){CLOSE}", text.text, re.DOTALL)[1].strip()


@torch.no_grad()
def read_images(model: torch.nn.Module, processor, images: list[bytes]) -> list[str]:
    """The text that the model reads in each image, by greedy generation in one batch."""
    inputs = processor(text=[IMAGE_TOKEN + OPEN] * len(images), images=images)
    # Where the closing tag is one token, generation can end at it.
    closing = processor.tokenizer.convert_tokens_to_ids(CLOSE)
    ends = [token for token in (processor.tokenizer.eos_token_id, closing) if token is not None]
    generated = model.generate(
        **inputs.to(model.device), do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends
    )
    texts = processor.tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.partition(CLOSE)[0].strip() for text in texts]


def summarize(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """By length of the truth: number of images, exact match, share of right characters in place."""
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(len(answer.truth), []).append(answer)
    return {
        str(length): {
            "images": len(group),
            "exact": sum(answer.exact for answer in group) / len(group),
            "characters": sum(
                sum(a == b for a, b in zip(answer.truth, answer.answer, strict=False)) / max(length, 1)
                for answer in group
            )
            / len(group),
        }
        for length, group in sorted(groups.items())
    }
