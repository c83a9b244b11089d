"""Preference and safety data sets, as published, to shards.

    python -m tools.preference_shards vlfeedback vlfeedback.jsonl --images IMAGES --out data/dpo/vlfeedback
    python -m tools.preference_shards vlguard train.json --images IMAGES --out data/safety/vlguard

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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from megablip.errors import ConfigError, SampleError
from tools.errors import errors_end_the_program
from tools.shard_writer import write_counted

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Source = Annotated[Path, typer.Argument(help="JSON or JSON lines, as published.")]
Images = Annotated[Path, typer.Option(help="Folder that the images' names are relative to.")]
Out = Annotated[Path, typer.Option(help="Folder for the shards; an earlier one is replaced.")]


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
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the file can't be read: {error}", where=str(path), remedy="give JSON or JSON lines"
        ) from None


def _image(images: Path, name: Any) -> tuple[str, bytes]:
    """Extension and bytes of an image; its name may come from anyone, so it stays within the folder."""
    if not isinstance(name, str):
        raise SampleError("a row names no image")
    path = (images / name).resolve()
    if not path.is_relative_to(images.resolve()):
        raise SampleError(f"'{name}' is outside the folder of images", where=str(images))
    try:
        return path.suffix.lstrip(".").lower() or "jpg", path.read_bytes()
    except OSError as error:
        raise SampleError(f"the image can't be read: {error.strerror}", where=str(path)) from None


if __name__ == "__main__":
    app(prog_name="python -m tools.preference_shards")
