"""The page of a replayed step: each packed sequence as the model saw it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megablip.metrics.picture import LEGEND
from megablip.pages import write_page
from megablip.records import IGNORE_LABEL, VisualLayout
from megablip.replay.batch import ReplayedSequence, ReplayedStep
from megablip.tokens import Tokenizer

MAX_SEQUENCES = 64  # drawn; those of the highest loss where there are more
THUMBNAIL = 96  # pixels


def write_replay(
    path: Path, step: ReplayedStep, losses: Sequence[Sequence[float]] | None, facts: list[tuple[str, str]]
) -> None:
    """Write one self-contained HTML file.

    Args:
        losses: mean loss of each document of each sequence (NaN without a label); None: they are not known.
        facts: name and value of what the head of the page says.
    """
    tokenizer = Tokenizer(step.config.model.path)
    order = list(range(len(step.sequences)))
    if losses and len(order) > MAX_SEQUENCES:
        highest = [max((loss for loss in losses[number] if math.isfinite(loss)), default=0.0) for number in order]
        order.sort(key=lambda number: -highest[number])
    shown = sorted(order[:MAX_SEQUENCES])
    write_page(
        path,
        "replay.html.j2",
        title=f"Step {step.step} of {step.config.run_dir}",
        facts=facts,
        colours={name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in LEGEND},
        sequences=[
            {
                "lane": sequence.packed.lane,
                "index": sequence.packed.index,
                "tokens": sequence.packed.tokens,
                "length": step.config.data.sequence_length,
                "tiles": len(sequence.packed.tiles),
                "documents": list(_documents(sequence, step.layout, tokenizer, losses and losses[number])),
            }
            for number in shown
            for sequence in [step.sequences[number]]
        ],
        more=len(order) - len(shown),
    )  # fmt: skip


def _documents(
    sequence: ReplayedSequence, layout: VisualLayout, tokenizer: Tokenizer, losses: Sequence[float] | None
) -> Iterator[dict[str, Any]]:
    packed = sequence.packed
    # Of each visual token its image, else -1; of each image its tiles.
    images = 1 + packed.grids.prod(axis=1) if len(packed.grids) else np.zeros(0, int)
    image_of = np.full(packed.tokens, -1)
    image_of[packed.visual_positions] = np.repeat(np.arange(len(images)), layout.spans(packed.grids)[1])
    first_tile = np.cumsum(images) - images
    start = 0
    for number, sample in enumerate(sequence.samples):
        end = start + sample.tokens
        parts = []
        for (image, trained), run in groupby(
            range(start, end), key=lambda place: (image_of[place], packed.labels[place] != IGNORE_LABEL)
        ):
            places = list(run)
            if image >= 0:
                tiles = packed.tiles[first_tile[image] : first_tile[image] + images[image]]
                parts.append({"kind": "visual", "count": len(places), "tiles": [_thumbnail(tile) for tile in tiles]})
            else:
                text = tokenizer.decode(int(packed.input_ids[place]) for place in places)
                parts.append({"kind": "trained" if trained else "masked", "text": text})
        loss = losses[number] if losses else math.nan
        yield {"sample": sample, "parts": parts, "loss": loss if math.isfinite(loss) else None}
        start = end


def _thumbnail(tile: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
