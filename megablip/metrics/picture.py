"""A packed example drawn as an image: what the model is trained on, at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megablip.metrics.sums import documents_of_images
from megablip.records import IGNORE_LABEL, MicroBatch, VisualLayout
from megablip.tokens import Tokenizer

WIDTH, MARGIN = 1280, 16
BAR_LEFT, BAR_HEIGHT = 190, 18
THUMBNAIL, THUMBNAILS = 56, 15
MAX_DOCUMENTS = 12
MAX_LINES, CHARACTERS = 3, 118

PAPER, INK, FAINT = (255, 255, 255), (32, 36, 44), (122, 128, 140)
TRAINED, MASKED, VISUAL = (46, 160, 67), (201, 206, 214), (64, 120, 216)
LEGEND = (("trained", TRAINED), ("masked", MASKED), ("visual", VISUAL))


@dataclass(frozen=True)
class _Document:
    source: str
    key: str
    kinds: np.ndarray  # int[n], index into LEGEND, of each token
    ids: np.ndarray  # int[n]
    tiles: np.ndarray  # uint8[t, 3, S, S]


def draw_example(
    micro_batch: MicroBatch, names: Sequence[str], tokenizer: Tokenizer, layout: VisualLayout, title: str
) -> Image.Image:
    """A micro-batch as a strip of all its documents, then its first documents one below the other.

    Each has a bar of its tokens, coloured by what becomes of them, its text
    (visual tokens as [image]) and its tiles.

    Args:
        micro_batch: on the host.
        names: of the sources.
    """
    documents = _documents(micro_batch, names, layout)
    shown = documents[:MAX_DOCUMENTS]
    texts = [_text(document, tokenizer) for document in shown]
    heights = [
        max(54, BAR_HEIGHT + 18 * len(lines) + (THUMBNAIL + 6) * bool(len(document.tiles))) + 14
        for document, lines in zip(shown, texts, strict=True)
    ]
    page = Image.new("RGB", (WIDTH, 132 + sum(heights) + 24), PAPER)
    draw = ImageDraw.Draw(page)
    large, normal, small = (ImageFont.load_default(size) for size in (20, 14, 12))

    tokens = sum(len(document.ids) for document in documents)
    tiles = sum(len(document.tiles) for document in documents)
    draw.text((MARGIN, 12), title, INK, large)
    draw.text((MARGIN, 40), f"{tokens} tokens, {len(documents)} documents, {tiles} tiles", FAINT, normal)
    _legend(draw, documents, tokens, normal)
    left: float = MARGIN
    for document in documents:  # the strip, to scale; a gap ends each document
        right = left + (WIDTH - 2 * MARGIN) * len(document.ids) / max(tokens, 1)
        _bar(draw, document.kinds, left, right - 2, 72, 30)
        left = right

    longest = max((len(document.ids) for document in shown), default=1)
    y = 122
    for document, lines, height in zip(shown, texts, heights, strict=True):
        draw.text((MARGIN, y), _shortened(document.source, 22), INK, normal)
        draw.text((MARGIN, y + 18), _shortened(document.key, 26), FAINT, small)
        draw.text((MARGIN, y + 34), f"{len(document.ids)} tokens", FAINT, small)
        right = BAR_LEFT + max(2, (WIDTH - MARGIN - BAR_LEFT) * len(document.ids) / longest)
        _bar(draw, document.kinds, BAR_LEFT, right, y, BAR_HEIGHT)
        below = y + BAR_HEIGHT + 4
        for line in lines:
            draw.text((BAR_LEFT, below), line, INK, normal)
            below += 18
        _thumbnails(page, draw, document.tiles, below + 2, normal)
        y += height
    if len(documents) > len(shown):
        draw.text((MARGIN, y), f"and {len(documents) - len(shown)} documents more", FAINT, normal)
    return page


def _documents(micro_batch: MicroBatch, names: Sequence[str], layout: VisualLayout) -> list[_Document]:
    visual = np.zeros(len(micro_batch.input_ids), bool)
    visual[micro_batch.visual_token_index.numpy()] = True
    ids, labels = micro_batch.input_ids.numpy(), micro_batch.labels.numpy()
    kinds = np.where(visual, 2, np.where(labels == IGNORE_LABEL, 1, 0))
    ends = np.cumsum(micro_batch.doc_lens)
    tiles = micro_batch.tiles.numpy()
    tile_documents = np.zeros(0, np.int64)
    if not micro_batch.dummy:
        tile_documents = documents_of_images(micro_batch, layout)[micro_batch.tile_to_image.numpy()]
    documents = []
    for number, (end, length) in enumerate(zip(ends, micro_batch.doc_lens, strict=True)):
        source = int(micro_batch.source[number])
        if source >= 0:
            part = slice(end - length, end)
            own = tiles[: len(tile_documents)][tile_documents == number]
            documents.append(_Document(names[source], micro_batch.keys[number], kinds[part], ids[part], own))
    return documents


def _text(document: _Document, tokenizer: Tokenizer) -> list[str]:
    parts = []
    for is_visual, run in groupby(zip(document.kinds == 2, document.ids, strict=True), key=lambda pair: pair[0]):
        parts.append("[image]" if is_visual else tokenizer.decode(int(token) for _, token in run))
    text = " ".join(" ".join(parts).split())
    lines = textwrap.wrap(text, CHARACTERS)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " ..."]
    return lines


def _bar(draw: ImageDraw.ImageDraw, kinds: np.ndarray, left: float, right: float, top: int, height: int) -> None:
    """One document: runs of like tokens as rectangles."""
    width = max(right - left, 1) / max(len(kinds), 1)
    start = 0
    for kind, run in groupby(kinds.tolist()):
        count = len(list(run))
        box = (left + start * width, top, max(left + (start + count) * width - 1, left + start * width), top + height)
        draw.rectangle(box, LEGEND[kind][1])
        start += count


def _legend(draw: ImageDraw.ImageDraw, documents: list[_Document], tokens: int, font: ImageFont.FreeTypeFont) -> None:
    counts = np.bincount(np.concatenate([np.zeros(0, int), *(d.kinds for d in documents)]), minlength=len(LEGEND))
    x = WIDTH - 560
    for (name, colour), count in zip(LEGEND, counts, strict=True):
        draw.rectangle((x, 42, x + 14, 56), colour)
        draw.text((x + 20, 40), f"{name} {count} ({count / max(tokens, 1):.0%})", INK, font)
        x += 185


def _thumbnails(
    page: Image.Image, draw: ImageDraw.ImageDraw, tiles: np.ndarray, top: int, font: ImageFont.FreeTypeFont
) -> None:
    x = BAR_LEFT
    for tile in islice(tiles, THUMBNAILS):
        picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
        page.paste(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR), (x, top))
        draw.rectangle((x, top, x + THUMBNAIL - 1, top + THUMBNAIL - 1), outline=MASKED)
        x += THUMBNAIL + 6
    if len(tiles) > THUMBNAILS:
        draw.text((x + 4, top + THUMBNAIL // 2 - 8), f"and {len(tiles) - THUMBNAILS} tiles more", FAINT, font)


def _shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
