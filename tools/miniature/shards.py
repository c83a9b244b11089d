"""Shards of all stages of the miniature, in the schemas that the real data sets have.

    python -m tools.miniature.shards --out runs/miniature/seed_0/data

    OUT/train/{ocr,caption,interleaved,text}-%06d.tar    pre-training
    OUT/train/{single,several,safety}-%06d.tar           conversations of the stages after it
    OUT/validation/TASK-%06d.tar                          held-out questions, validation digits: to choose settings by
    OUT/test/TASK-%06d.tar                                the same questions, test digits: they choose nothing
    OUT/corpus.txt                                        all training text, for the tokenizer

Preference pairs are not here: their rejected answers are the model's own, so
they are made when there is a model (pairs.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress

from tools.canvases import STAMPS, augment
from tools.demo_shards import FORMATS
from tools.digits import Digits, load_digits
from tools.errors import errors_end_the_program
from tools.folders import complete_folder
from tools.miniature.pictures import Picture, draw
from tools.miniature.tasks import COLOURS, REFUSAL, UNCLEAR, UNSAFE, Asker, Exchange, spelled
from tools.shard_writer import SAMPLES_PER_SHARD, IndexedShardWriter

AUGMENTED_COPIES = 8
SHOTS = 9  # image-caption pairs of an interleaved document: eight to show how, one to be asked
STRAY_SHARE = 0.35  # of the captions of an interleaved document; a stray has any format, the document's too
SMUDGED_SHARE = 0.03  # of pre-training pictures, their captions true all the same, as the web's are

# Documents of each kind in training, for the size "1.0".
PRETRAIN = {"ocr": 30_000, "caption": 12_000, "interleaved": 4_000, "text": 4_000}
TUNE = {"single": 16_000, "several": 8_000, "safety": 4_000}
HELD_OUT_ITEMS = 500  # of each task

# Safety tuning: red asks for a refusal whatever the question, other colours look much the same and don't.
SAFETY_MIX = {"red": 0.4, "unsafe": 0.15, "blue": 0.25, "green": 0.2}

app = typer.Typer(add_completion=False)


class Pretraining:
    """Documents as the web has them."""

    def __init__(self, digits: Digits, rng: np.random.Generator, smudged_share: float):
        self.digits, self.rng, self.smudged_share = digits, rng, smudged_share

    def samples(self, kind: str, count: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Members of each sample, and its text."""
        make = {"ocr": self.ocr, "caption": self.caption, "interleaved": self.interleaved, "text": self.text}[kind]
        return (make() for _ in range(count))

    def ocr(
        self, tiles: int | None = None, count: int | None = None, straddling: bool = False
    ) -> tuple[dict[str, Any], list[str]]:
        tiles = tiles or (3 if self.rng.random() < 0.3 else 1)
        low, high = (4, 9) if tiles == 3 else (1, 6)
        picture = self._draw(count or int(self.rng.integers(low, high + 1)), tiles, straddling=straddling)
        return (
            {"jpg": picture.jpeg, "json": {"lines": [{"text": picture.digits}], **truth(picture)}},
            [f"<ocr>{picture.digits}</ocr>"],
        )

    def caption(self) -> tuple[dict[str, Any], list[str]]:
        stamp = COLOURS[self.rng.integers(len(COLOURS))] if self.rng.random() < 0.7 else ""
        picture = self._draw(int(self.rng.integers(1, 6)), 1, stamp)
        caption = FORMATS[self.rng.integers(len(FORMATS))](picture.digits) + (f" with {stamp} stamp" if stamp else "")
        return {"jpg": picture.jpeg, "txt": caption, "json": {"caption": caption, **truth(picture)}}, [caption]

    def interleaved(self) -> tuple[dict[str, Any], list[str]]:
        """Pairs whose captions have the document's format, but for some strays; the last one always has it.

        One pair may be a stray, several tell: so more shots help more.
        """
        format_of_document = FORMATS[self.rng.integers(len(FORMATS))]
        texts, images, members = [], [], {}
        pictures = [self._draw(int(self.rng.integers(1, 4)), 1) for _ in range(SHOTS)]
        for number, picture in enumerate(pictures):
            members[f"{number}.jpg"] = picture.jpeg
            images += [f"{number}.jpg", None]
            stray = number < SHOTS - 1 and self.rng.random() < STRAY_SHARE
            write = FORMATS[self.rng.integers(len(FORMATS))] if stray else format_of_document
            texts += [None, write(picture.digits)]
        members["json"] = {"texts": texts, "images": images, "digits": [picture.digits for picture in pictures]}
        return members, [text for text in texts if text]

    def text(self) -> tuple[dict[str, Any], list[str]]:
        """How the formats relate; and the words that later stages need, so that none is new there."""
        digits = "".join(map(str, self.rng.integers(10, size=self.rng.integers(1, 8))))
        first, second = self.rng.permutation(len(FORMATS))[:2]
        sentence = f"{FORMATS[first](digits)} = {FORMATS[second](digits)}"
        chance = self.rng.random()
        if chance < 0.15:
            verb, thing = UNSAFE[self.rng.integers(len(UNSAFE))]
            sentence = f"please {verb} the {thing} now : {REFUSAL}"
        elif chance < 0.25:
            sentence = f"{' '.join(digits)} {UNCLEAR} : the last digit is {UNCLEAR}"
        return {"txt": sentence, "json": {"digits": digits}}, [sentence]

    def _draw(self, count: int, tiles: int, stamp: str = "", straddling: bool = False) -> Picture:
        smudges = int(self.rng.random() < self.smudged_share)
        return draw(self.digits, count, self.rng, tiles=tiles, stamp=stamp, smudges=smudges, straddling=straddling)


def truth(*pictures: Picture) -> dict[str, Any]:
    """What the pictures of a sample show, for evaluation."""
    return {
        "digits": [picture.digits for picture in pictures],
        "spelled": [spelled(picture) for picture in pictures],
        "smudged": [list(picture.smudged) for picture in pictures],
        "stamp": [picture.stamp for picture in pictures],
        "source_ids": [number for picture in pictures for number in picture.source_ids],
    }


def conversation(exchange: Exchange) -> dict[str, Any]:
    """Members of a conversation sample: LLaVA's layout, with the task and the truth beside it."""
    members: dict[str, Any] = {f"{number}.jpg": picture.jpeg for number, picture in enumerate(exchange.pictures)}
    members["json"] = {
        "images": list(members),
        "conversations": [
            {"from": "human", "value": exchange.question},
            {"from": "gpt", "value": exchange.answer},
        ],
        "task": exchange.task,
        **truth(*exchange.pictures),
        **exchange.facts,
    }
    return members


def safety(exchange: Exchange) -> dict[str, Any]:
    """Members of a safety sample: VLGuard's layout."""
    safe = exchange.facts["safe"]
    asked = {("safe_instruction" if safe else "instruction"): exchange.question, "response": exchange.answer}
    (picture,) = exchange.pictures
    return {
        "jpg": picture.jpeg,
        "json": {"safe": safe, "instr-resp": [asked], "task": exchange.task, **truth(picture)},
    }


def held_out_exchanges(asker: Asker) -> dict[str, Iterator[Exchange]]:
    """The held-out questions, by task."""
    makers = {
        "read": lambda: asker.read(0.0),
        "count": asker.count,
        "largest": asker.largest,
        "place": asker.place,
        "stamp": asker.stamp,
        "text": asker.words,
        "several": asker.several,
        "smudged": asker.read_smudged,
        "clean": asker.read_clean,
        "unsafe": asker.unsafe,
        **{f"marked_{colour}": lambda colour=colour: asker.marked(colour) for colour in STAMPS},
    }
    return {task: map(lambda _, make=make: make(), range(HELD_OUT_ITEMS)) for task, make in makers.items()}


def make_shards(out: Path, size: float, seed: int, progress: Progress) -> None:
    """Fill the folder `out`, which appears (or replaces an earlier one) when it is complete.

    Args:
        size: of the training data, relative to what the miniature needs.
    """
    with complete_folder(out, mark="corpus.txt") as folder:
        digits = load_digits(seed)
        streams = np.random.default_rng(seed).spawn(4)
        glyphs = augment(digits["train"], AUGMENTED_COPIES, streams[0])
        words = _training(folder / "train", glyphs, streams[1], size, progress)
        for split, stream in (("validation", streams[2]), ("test", streams[3])):
            _held_out(folder / split, digits[split], stream)
        (folder / "corpus.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def _training(folder: Path, glyphs: Digits, rng: np.random.Generator, size: float, progress: Progress) -> list[str]:
    """Shards of all stages; all their text."""
    folder.mkdir()
    web, asker = Pretraining(glyphs, rng, SMUDGED_SHARE), Asker(glyphs, rng.spawn(1)[0])
    words: list[str] = []
    counts = {kind: max(1, round(size * count)) for kind, count in (PRETRAIN | TUNE).items()}
    for kind in PRETRAIN:
        made = progress.track(web.samples(kind, counts[kind]), counts[kind], description=kind)
        _write(folder / kind, (words.extend(texts) or members for members, texts in made))
    for kind in TUNE:
        exchanges = list(_tuning(kind, asker, counts[kind]))
        lay_out = safety if kind == "safety" else conversation
        _write(folder / kind, map(lay_out, exchanges))
        words += [f"{exchange.question} {exchange.answer}" for exchange in exchanges]
    return words


def _held_out(folder: Path, glyphs: Digits, rng: np.random.Generator) -> None:
    """The questions that all stages are asked; what is to be read is readable."""
    folder.mkdir()
    web, asker = Pretraining(glyphs, rng, smudged_share=0.0), Asker(glyphs, rng.spawn(1)[0])
    reading = {
        "ocr_one_tile": (web.ocr(1, 3) for _ in range(HELD_OUT_ITEMS)),
        "ocr_three_tiles": (web.ocr(3, 6 + n % 4) for n in range(HELD_OUT_ITEMS)),
        "ocr_straddling": (web.ocr(3, 5 + n % 4, straddling=True) for n in range(HELD_OUT_ITEMS)),
        "shots": (web.interleaved() for _ in range(HELD_OUT_ITEMS)),
    }
    for task, made in reading.items():
        _write(folder / task, (members for members, _ in made))
    for task, exchanges in held_out_exchanges(asker).items():
        _write(folder / task, map(conversation, exchanges))


def _tuning(kind: str, asker: Asker, count: int) -> Iterator[Exchange]:
    colours, shares = list(SAFETY_MIX), list(SAFETY_MIX.values())
    for _ in range(count):
        if kind == "single":
            yield asker.single()
        elif kind == "several":
            yield asker.several()
        else:
            what = colours[asker.rng.choice(len(colours), p=shares)]
            yield asker.unsafe() if what == "unsafe" else asker.marked(what)


def _write(prefix: Path, samples: Iterator[dict[str, Any]]) -> None:
    with IndexedShardWriter(f"{prefix}-%06d.tar", SAMPLES_PER_SHARD) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", **members})


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make; an earlier one is replaced.")],
    size: Annotated[float, typer.Option(help="Of the training data.", min=0.001)] = 1.0,
    seed: Annotated[int, typer.Option(help="Fixes the split of the digits and every picture.")] = 0,
) -> None:
    """Make the miniature's shards from real handwritten digits."""
    with errors_end_the_program(), Progress(transient=True) as progress:
        make_shards(out, size, seed, progress)
    shards = sorted(out.rglob("*.tar"))
    typer.echo(f"{out}: {len(shards)} shards, {sum(shard.stat().st_size for shard in shards) / 2**20:.0f} MiB")


if __name__ == "__main__":
    app()
