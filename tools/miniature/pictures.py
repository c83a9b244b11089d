"""Pictures of the miniature's world: a line of digits, perhaps smudged, perhaps with a coloured stamp."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tools.canvases import CELL, EMPTY, cell_of, paint, put_stamp, smudge
from tools.digits import Digits

TILE_CELLS = 3  # cells of a tile's side: 48 pixels
JPEG_QUALITY = 95  # encodes 8 times faster than PNG and is a third of its size on noisy paper


@dataclass(frozen=True)
class Picture:
    """What a picture shows, and its file.

    Attributes:
        digits: left to right, as drawn.
        smudged: places in `digits` that nobody can read.
        stamp: colour of the stamp, "" without one.
        source_ids: the source digits it was drawn from.
        jpeg: the file.
    """

    digits: str
    smudged: tuple[int, ...]
    stamp: str
    source_ids: tuple[int, ...]
    jpeg: bytes


def draw(
    digits: Digits,
    count: int,
    rng: np.random.Generator,
    *,
    tiles: int = 1,
    stamp: str = "",
    smudges: int = 0,
    straddling: bool = False,
) -> Picture:
    """`count` digits side by side on a row of `tiles` tiles (a single tile is drawn two wide, its template).

    Args:
        stamp: a colour of STAMPS, put on a free cell.
        smudges: so many of the digits are made unreadable.
        straddling: move all by half a cell, so that digits lie across the edges of tiles; needs a free cell.
    """
    columns = TILE_CELLS * max(tiles, 2)
    row, start = int(rng.integers(TILE_CELLS)), int(rng.integers(columns - count - straddling + 1))
    chosen = rng.integers(len(digits), size=count)
    cells = np.full((TILE_CELLS, columns), EMPTY)
    cells[row, start : start + count] = chosen
    pixels = paint(digits, cells, rng)
    smudged = sorted(rng.choice(count, size=smudges, replace=False).tolist()) if smudges else []
    for place in smudged:
        smudge(cell_of(pixels, row, start + place), rng)
    if stamp:
        free = np.argwhere(cells == EMPTY)
        put_stamp(cell_of(pixels, *free[rng.integers(len(free))]), stamp, rng)
    if straddling:
        pixels = np.roll(pixels, CELL // 2, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Picture(
        "".join(map(str, digits.labels[chosen])),
        tuple(smudged),
        stamp,
        tuple(digits.ids[chosen].tolist()),
        buffer.getvalue(),
    )
