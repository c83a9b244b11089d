"""Data sets of the stages after pre-training, as published, to shards; and samples of shards.

    python -m tools.post_training_shards conversations llava.json --images IMAGES --out data/sft/llava
    python -m tools.post_training_shards sample 'data/sft/*/*.tar' --count 5000 --out data/safety/sft_5k
    python -m tools.post_training_shards vlfeedback vlfeedback.jsonl --images IMAGES --out data/dpo/vlfeedback
    python -m tools.post_training_shards vlguard train.json --images IMAGES --out data/safety/vlguard

conversations: rows as LLaVA has them ("image": path or list, "conversations") or
Mantis ("images", "conversation").  A row that has lost an image, or that training
could not read, is counted, told and left out.  --sample draws so many rows that can
be used, each once.

sample: draws so many of the samples of shards, of any schema, each once.

vlfeedback: of each prompt the answer with the highest mean rating is chosen, the
one with the lowest rejected (arXiv 2408.08872, post-training: 62.6k of 80k
prompts).  Ratings that are no numbers are left out of the mean, and answers
without any rating out of the choice; prompts whose best and worst tie are dropped.

vlguard: each exchange is a sample of its own: a harmful image has one, a harmless
image two (2,000 images of the training set, 2,977 exchanges).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress

from megablip.config import SourceConfig
from megablip.data.members import IMAGE_EXTENSIONS, mapping
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import ConfigError, SampleError
from tools.errors import errors_end_the_program, leave_out
from tools.shard_writer import write_counted

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Source = Annotated[Path, typer.Argument(help="JSON or JSON lines, as published.")]
Images = Annotated[Path, typer.Option(help="Folder that the images' names are relative to.")]
Seed = Annotated[int, typer.Option(help="Of the draw.", min=0)]
Out = Annotated[Path, typer.Option(help="Folder for the shards; an earlier one is replaced.")]


class MissingImageError(SampleError):
    """An image that a row names is not in the folder."""


def mean_rating(annotations: Any) -> float | None:
    """Mean over the aspects whose rating is a finite number; None without any.

    Args:
        annotations: {aspect: {"Rating": "4", ...}}, as GPT-4V's judgements are published.
    """
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        try:
            rating = float(aspect["Rating"])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(rating):
            ratings.append(rating)
    return sum(ratings) / len(ratings) if ratings else None


def best_and_worst(row: dict[str, Any]) -> tuple[str, str] | None:
    """The answers with the highest and the lowest mean rating, the first of equals; None where they tie.

    Args:
        row: {"completions": {"response": [str], "annotations": [...]}}.

    Raises:
        SampleError: the row is laid out in another way.
    """
    completions = row.get("completions")
    if isinstance(completions, list):  # one object an answer
        completions = {name: [answer.get(name) for answer in completions] for name in ("response", "annotations")}
    if not isinstance(completions, dict):
        raise SampleError('the row has no "completions"')
    answers, annotations = completions.get("response"), completions.get("annotations")
    if not isinstance(answers, list) or not isinstance(annotations, list) or len(answers) != len(annotations):
        raise SampleError('"response" and "annotations" are not two lists of the same length')
    rated = [
        (rating, answer.strip())  # as training reads it
        for answer, rating in zip(answers, map(mean_rating, annotations), strict=True)
        if rating is not None and isinstance(answer, str) and answer.strip()
    ]
    if not rated:
        return None
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    return None if best[0] == worst[0] or best[1] == worst[1] else (best[1], worst[1])


def vlfeedback_samples(rows: Iterable[dict[str, Any]], images: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """A preference sample of each prompt that has a best and a worst answer."""
    for number, row in enumerate(rows):
        pair = best_and_worst(row)
        if pair is None:
            counts["without a preference"] += 1
            continue
        counts["pairs"] += 1
        name, data = _image(images, row.get("img_path") or row.get("image"))
        yield {
            "__key__": f"vlfeedback_{number:06d}",
            name: data,
            "json": {"prompt": row["prompt"], "chosen": pair[0], "rejected": pair[1]},
        }


def vlguard_samples(rows: Iterable[dict[str, Any]], images: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """A safety sample of each exchange."""
    for row in rows:
        name, data = _image(images, row.get("image"))
        for number, exchange in enumerate(row["instr-resp"]):
            counts["exchanges on safe images" if row["safe"] else "exchanges on harmful images"] += 1
            content = {"safe": row["safe"], "instr-resp": [exchange]}
            yield {"__key__": f"vlguard_{row['id']}_{number}".replace(".", "_"), name: data, "json": content}


def conversation_samples(
    rows: Iterable[tuple[int, Any]], images: Path | None, name: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """A conversation of each row that training can read.

    Args:
        rows: their numbers and contents.
        name: of the set; keys begin with it.

    Raises:
        ConfigError: a row names an image, and `images` is None.
    """
    config = SourceConfig(name=name, shards="", schema="conversation", weight=1)
    for number, row in rows:
        try:
            named = _image_names(mapping(row, "the row"))
            if named and images is None:
                raise ConfigError(
                    f"row {number} names an image", where=name, remedy="say by --images where the images are"
                )
            files = [_image(images, entry) for entry in named]
            members = {f"{place}.{extension}": data for place, (extension, data) in enumerate(files)}
            content = {field: value for field, value in row.items() if field not in ("image", "images")}
            sample = {"__key__": f"{name}_{number:07d}", **members, "json": json.dumps(content).encode()}
            SCHEMAS["conversation"](sample, config, sample["__key__"])
        except SampleError as error:
            missing = isinstance(error, MissingImageError)
            why = "an image is missing" if missing else "not a conversation as training reads it"
            leave_out(f"row {number}", why, error, counts)
            continue
        counts["conversations"] += 1
        counts["images"] += len(files)
        yield sample


def shard_samples(source: ShardSource, order: Iterable[int], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Samples of shards by their numbers among all, with keys that begin with these: several shards may share keys."""
    ends = np.cumsum(source.counts)
    for number in order:
        shard = int(np.searchsorted(ends, number, side="right"))
        sample = int(number - ends[shard] + source.counts[shard])
        try:
            key, members = source.read(shard, sample)
        except SampleError as error:
            leave_out(f"{source.paths[shard]}, sample {sample}", "can't be read", error, counts)
            continue
        counts["samples"] += 1
        yield {"__key__": f"{number:08d}_{key}", **members}


def drawn(total: int, count: int, seed: int, where: str) -> np.ndarray:
    """All of `total` numbers in an order drawn at random, of which the first `count` are the draw.

    The others take the place of those that can't be used.

    Raises:
        ConfigError: `count` is more than `total`.
    """
    if count > total:
        raise ConfigError(f"{count} of {total} can't be drawn without repeats", where=where, remedy="draw fewer")
    return np.random.default_rng(seed).permutation(total)


def exactly(count: int, samples: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The first `count` of samples.

    Raises:
        ConfigError: there are fewer.
    """
    found = 0
    for sample in islice(samples, count):
        found += 1
        yield sample
    if found < count:
        raise ConfigError(f"only {found} of {count} can be used", where=where, remedy="draw fewer")


@app.command()
def conversations(
    source: Source,
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the images' names are relative to, if there are images.")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Rows to draw, each once; all if not given.", min=1)] = None,
    seed: Seed = 0,
) -> None:
    """Conversations as LLaVA or Mantis has them."""
    counts: Counter[str] = Counter()
    with errors_end_the_program(), Progress(transient=True) as progress:
        rows = read_rows(source)
        order = range(len(rows)) if sample is None else drawn(len(rows), sample, seed, str(source)).tolist()
        numbered = progress.track(
            ((number, rows[number]) for number in order), sample or len(rows), description=source.name
        )
        samples = conversation_samples(numbered, images, re.sub(r"[^\w-]", "_", source.stem), counts)
        line = write_counted(out, samples if sample is None else exactly(sample, samples, str(source)), counts)
    typer.echo(line)


@app.command("sample")
def sample_of_shards(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, folders, globs or braces.", metavar="SHARDS...")],
    out: Out,
    count: Annotated[int, typer.Option(help="Samples to draw, each once.", min=1)],
    seed: Seed = 0,
) -> None:
    """A random sample of shards."""
    counts: Counter[str] = Counter()
    with errors_end_the_program(), Progress(transient=True) as progress:
        source, where = ShardSource("sample", expand_shards(shards)), " ".join(shards)
        order = drawn(source.total, count, seed, where).tolist()
        samples = shard_samples(source, progress.track(order, count, description="samples"), counts)
        line = write_counted(out, exactly(count, samples, where), counts)
    typer.echo(line)


@app.command()
def vlfeedback(source: Source, images: Images, out: Out) -> None:
    """Best and worst answers of VLFeedback as preference pairs."""
    _write(source, images, out, vlfeedback_samples)


@app.command()
def vlguard(source: Source, images: Images, out: Out) -> None:
    """VLGuard's exchanges as safety samples."""
    _write(source, images, out, vlguard_samples)


def _write(source: Path, images: Path, out: Path, make: Any) -> None:
    counts: Counter[str] = Counter()
    with errors_end_the_program():
        try:
            with Progress(transient=True) as progress:
                rows = progress.track(read_rows(source), description=source.name)
                line = write_counted(out, make(rows, images, counts), counts)
        except (KeyError, TypeError, AttributeError) as error:
            typer.echo(f"error: a row of {source} lacks {error}", err=True)
            raise typer.Exit(1) from None
    typer.echo(line)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON array, or of JSON lines.

    Raises:
        ConfigError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        # Not splitlines, which also cuts where JSON may hold a character such as U+2028 as it is.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the file can't be read: {error}", where=str(path), remedy="give JSON or JSON lines"
        ) from None


def _image_names(row: dict[str, Any]) -> list[Any]:
    """What "images" or "image" names: a path, {"path": ...}, or a list of these."""
    named = row.get("images", row.get("image")) or []
    entries = named if isinstance(named, list) else [named]
    return [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]


def _image(images: Path, name: Any) -> tuple[str, bytes]:
    """Extension and bytes of an image; its name may come from anyone, so it stays within the folder."""
    if not isinstance(name, str):
        raise MissingImageError("a row names no image")
    # By the name alone: what links within the folder lead to is the owner's choice.
    path = Path(os.path.abspath(images / name))
    if not path.is_relative_to(os.path.abspath(images)):
        raise MissingImageError(f"'{name}' is outside the folder of images", where=str(images))
    extension = path.suffix.lstrip(".").lower()
    try:
        return extension if extension in IMAGE_EXTENSIONS else "jpg", path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise MissingImageError(f"the image '{name}' can't be read: {what}", where=str(path)) from None


if __name__ == "__main__":
    app(prog_name="python -m tools.post_training_shards")
