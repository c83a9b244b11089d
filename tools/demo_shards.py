"""Make the demo's data: webdataset shards of canvases with real handwritten digits.

    python -m tools.demo_shards --out runs/demo/data

    OUT/train/{ocr,caption,interleaved,text}-%06d.tar   augmented train digits
    OUT/validation/...                                   the same four kinds, validation digits
    OUT/test/ocr-%06d.tar                                test digits: see TEST
    OUT/*/*.idx                                          their indexes
    OUT/corpus.txt                                       all training text, for the tokenizer

The samples are laid out as real data sets are (img2dataset's captions, OCR
lines with boxes, parallel `texts` and `images` lists).  Each json also carries
the truth: "digits" (a list in interleaved documents) and "source_ids".
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import Progress

from tools.canvases import Canvas, augment, draw_line
from tools.digits import Digits, load_digits
from tools.errors import errors_end_the_program
from tools.folders import complete_folder
from tools.shard_writer import SAMPLES_PER_SHARD, IndexedShardWriter

# Share of each kind of document. OCR leads: reading is what the demo is judged by.
KINDS = {"ocr": 0.72, "caption": 0.10, "interleaved": 0.08, "text": 0.10}
VALIDATION_SHARE = 0.02  # of the number of training documents

# Canvas (width, height) in pixels -> (share, numbers of digits and their weights).
# A tile is 48 pixels, so each canvas is one template of tiles without padding.
CANVASES: dict[tuple[int, int], tuple[float, dict[int, float]]] = {
    (96, 48): (0.70, {1: 1, 2: 1.5, 3: 4, 4: 1.5, 5: 1, 6: 1}),
    (48, 96): (0.15, {1: 1, 2: 1, 3: 1}),
    (144, 48): (0.15, {3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}),
}
BBOX_SHARE = 0.15  # of OCR lines: a box is some 24 tokens
PAIRS = (3, 9)  # fewest and most image-caption pairs of an interleaved document
PAIR_DIGITS = (1, 3)

# The test set, in the order of its keys: (canvas, digits, images).
TEST = [
    ((96, 48), 3, 640),
    *(((96, 48), count, 80) for count in (4, 5, 6)),
    *(((144, 48), count, 80) for count in (6, 7, 8, 9)),
]

AUGMENTED_COPIES = 8  # variants of each training digit
JPEG_QUALITY = 95  # encodes 8 times faster than PNG and is a third of its size on noisy paper

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Ways to caption the same digits. A document of pairs keeps to one of them, so
# its first caption shows how the next are written: that is what few-shot
# prompting is tested on.
FORMATS: tuple[Callable[[str], str], ...] = (
    lambda digits: f"digits: {digits}",
    lambda digits: "reads " + " ".join(WORDS[int(digit)] for digit in digits),
    lambda digits: f"[{', '.join(digits)}]",
    lambda digits: f"reversed {digits[::-1]}",
    lambda digits: f"number {'; '.join(digits)}.",
)


app = typer.Typer(add_completion=False)


@dataclass
class Sample:
    """Members of one sample, and its text as the model will see it."""

    members: dict[str, Any]
    texts: list[str]


class Maker:
    """Makes samples of each kind from one split's digits.

    A shard writer's encoder turns the "json" members into bytes.
    """

    def __init__(self, digits: Digits, rng: np.random.Generator):
        self.digits, self.rng = digits, rng

    def samples(self, kind: str, count: int) -> Iterator[Sample]:
        make = {"ocr": self.ocr, "caption": self.caption, "interleaved": self.interleaved, "text": self.text}[kind]
        return (make() for _ in range(count))

    def test_samples(self) -> Iterator[Sample]:
        return (self.ocr(self._draw(canvas, digits)) for canvas, digits, images in TEST for _ in range(images))

    def ocr(self, canvas: Canvas | None = None) -> Sample:
        canvas = canvas or self._canvas()
        line: dict[str, Any] = {"text": canvas.digits}
        markup = f"<ocr>{canvas.digits}</ocr>"
        if self.rng.random() < BBOX_SHARE:
            line["bbox"] = [round(share, 4) for share in canvas.bbox]
            x1, y1, x2, y2 = (f"{share:.2f}" for share in canvas.bbox)
            markup += f"<bbox>[{x1}, {y1}][{x2}, {y2}]</bbox>"
        return Sample({"jpg": _jpeg(canvas), "json": {"lines": [line], **_truth(canvas)}}, [markup])

    def caption(self) -> Sample:
        canvas = self._canvas()
        caption = self._format()(canvas.digits)
        return Sample({"jpg": _jpeg(canvas), "txt": caption, "json": {"caption": caption, **_truth(canvas)}}, [caption])

    def interleaved(self) -> Sample:
        write = self._format()
        canvases = [
            self._draw((96, 48), int(self.rng.integers(PAIR_DIGITS[0], PAIR_DIGITS[1] + 1)))
            for _ in range(self.rng.integers(PAIRS[0], PAIRS[1] + 1))
        ]
        texts, images, members = [], [], {}
        for number, canvas in enumerate(canvases):
            members[f"{number}.jpg"] = _jpeg(canvas)
            images += [f"{number}.jpg", None]
            texts += [None, write(canvas.digits)]
        truth = {
            "digits": [canvas.digits for canvas in canvases],
            "source_ids": [number for canvas in canvases for number in canvas.source_ids],
        }
        members["json"] = {"texts": texts, "images": images, **truth}
        return Sample(members, [text for text in texts if text is not None])

    def text(self) -> Sample:
        """The same digits written in several ways: how the captions' formats relate."""
        digits = "".join(map(str, self.rng.integers(10, size=self.rng.integers(1, 10))))
        first, second = self.rng.permutation(len(FORMATS))[:2]
        sentence = f"{FORMATS[first](digits)} = {FORMATS[second](digits)}"
        return Sample({"txt": sentence, "json": {"digits": digits, "source_ids": []}}, [sentence])

    def _format(self) -> Callable[[str], str]:
        return FORMATS[self.rng.integers(len(FORMATS))]

    def _canvas(self) -> Canvas:
        sizes = list(CANVASES)
        size = sizes[_pick([CANVASES[size][0] for size in sizes], self.rng)]
        counts = CANVASES[size][1]
        return self._draw(size, list(counts)[_pick(list(counts.values()), self.rng)])

    def _draw(self, size: tuple[int, int], count: int) -> Canvas:
        return draw_line(self.digits, *size, count, self.rng)


def make_demo_shards(out: Path, documents: int, seed: int, progress: Progress) -> None:
    """Fill the folder `out`, which appears (or replaces an earlier one) when it is complete.

    Raises:
        ConfigError: `out` holds something else, or the digits are not installed.
    """
    task = progress.add_task("demo shards", total=None)

    def write(folder: Path, kind: str, samples: Iterator[Sample], count: int) -> list[str]:
        progress.update(task, description=f"{folder.name}/{kind}", completed=0, total=count)
        texts: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        with IndexedShardWriter(str(folder / f"{kind}-%06d.tar"), SAMPLES_PER_SHARD) as writer:
            for number, sample in enumerate(samples):
                writer.write({"__key__": f"{folder.name}-{kind}-{number:06d}", **sample.members})
                texts += sample.texts
                progress.advance(task)
        return texts

    with complete_folder(out, mark="corpus.txt") as folder:
        digits = load_digits(seed)
        streams = np.random.default_rng(seed).spawn(4)
        train = Maker(augment(digits["train"], AUGMENTED_COPIES, streams[0]), streams[1])
        validation, test = Maker(digits["validation"], streams[2]), Maker(digits["test"], streams[3])
        corpus: list[str] = []
        for kind, share in KINDS.items():
            count = round(share * documents)
            corpus += write(folder / "train", kind, train.samples(kind, count), count)
            count = max(1, round(share * VALIDATION_SHARE * documents))
            write(folder / "validation", kind, validation.samples(kind, count), count)
        write(folder / "test", "ocr", test.test_samples(), sum(images for *_, images in TEST))
        (folder / "corpus.txt").write_text("\n".join(corpus) + "\n", encoding="utf-8")


def _truth(canvas: Canvas) -> dict[str, Any]:
    return {"digits": canvas.digits, "source_ids": canvas.source_ids}


def _jpeg(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(canvas.pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _pick(weights: list[float], rng: np.random.Generator) -> int:
    """An index with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make; an earlier one is replaced.")],
    documents: Annotated[int, typer.Option(help="Training documents of all kinds.", min=100)] = 24_000,
    seed: Annotated[int, typer.Option(help="Fixes the split of the digits and every canvas.")] = 0,
) -> None:
    """Make the demo's shards from real handwritten digits."""
    with errors_end_the_program(), Progress(transient=True) as progress:
        make_demo_shards(out, documents, seed, progress)
    shards = sorted(out.rglob("*.tar"))
    typer.echo(f"{out}: {len(shards)} shards, {sum(shard.stat().st_size for shard in shards) / 2**20:.0f} MiB")


if __name__ == "__main__":
    app()
