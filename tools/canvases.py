"""Draw handwritten digits on canvases: cells of 16 x 16 pixels, random colours, noise; stamps and smudges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.digits import SIDE as CELL
from tools.digits import Digits

EMPTY = -1  # a cell without a digit

MAX_ROTATION_DEGREES = 12.0
MAX_SHEAR = 0.12
SCALES = (0.88, 1.08)  # of the ink; beyond this neighbours would touch
MAX_JITTER = 1  # pixels that a digit strays from its cell's middle
MIN_CONTRAST = 90.0  # between the grey values of ink and paper
MAX_NOISE = 12.0  # grey levels
STAMPS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 214)}


@dataclass(frozen=True)
class Canvas:
    """A drawn line of digits.

    Attributes:
        pixels: uint8[height, width, 3].
        digits: what it says, left to right.
        source_ids: the source digits it was drawn from.
        bbox: x1, y1, x2, y2 of the line's cells as shares of width and height.
    """

    pixels: np.ndarray
    digits: str
    source_ids: list[int]
    bbox: list[float]


def augment(digits: Digits, copies: int, rng: np.random.Generator) -> Digits:
    """`copies` variants of each digit, rotated, sheared and scaled at random."""
    warped = [_warp(digits.pixels, rng) for _ in range(copies)]
    return Digits(np.concatenate(warped), np.tile(digits.labels, copies), np.tile(digits.ids, copies))


def draw_line(digits: Digits, width: int, height: int, count: int, rng: np.random.Generator) -> Canvas:
    """A canvas of `width` x `height` pixels with one line of `count` digits in neighbouring cells."""
    columns, rows = width // CELL, height // CELL
    row, start = int(rng.integers(rows)), int(rng.integers(columns - count + 1))
    chosen = rng.integers(len(digits), size=count)
    cells = np.full((rows, columns), EMPTY)
    cells[row, start : start + count] = chosen
    return Canvas(
        pixels=paint(digits, cells, rng),
        digits="".join(map(str, digits.labels[chosen])),
        source_ids=digits.ids[chosen].tolist(),
        bbox=[start / columns, row / rows, (start + count) / columns, (row + 1) / rows],
    )


def paint(digits: Digits, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the digits whose indices stand in `cells` [rows, columns]: uint8[rows * 16, columns * 16, 3]."""
    height, width = cells.shape[0] * CELL, cells.shape[1] * CELL
    ink = np.zeros((height + 2 * MAX_JITTER, width + 2 * MAX_JITTER), dtype=np.float32)
    for row, column in np.argwhere(cells != EMPTY):
        dy, dx = rng.integers(2 * MAX_JITTER + 1, size=2)
        place = ink[row * CELL + dy :, column * CELL + dx :][:CELL, :CELL]
        np.maximum(place, digits.pixels[cells[row, column]], out=place)
    ink = ink[MAX_JITTER : MAX_JITTER + height, MAX_JITTER : MAX_JITTER + width, None]
    paper_colour, ink_colour = _colours(rng)
    amplitude = np.float32(rng.uniform(0, MAX_NOISE))
    noise = rng.random((height, width, 1), dtype=np.float32)
    pixels = ink * (ink_colour - paper_colour)
    pixels += paper_colour + amplitude * (2 * noise - 1)
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def cell_of(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """A view of one cell of uint8[height, width, 3]."""
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def smudge(cell: np.ndarray, rng: np.random.Generator) -> None:
    """Cover a cell's middle with grey blotches: that a digit was there still shows, which one does not."""
    y, x = np.mgrid[:CELL, :CELL]
    inside = (y - CELL / 2 + 0.5) ** 2 + (x - CELL / 2 + 0.5) ** 2 < (CELL / 2 - 0.5) ** 2
    blotches = rng.integers(70, 190, size=(CELL // 4, CELL // 4)).repeat(4, 0).repeat(4, 1)
    cell[inside] = blotches[inside][:, None]


def put_stamp(cell: np.ndarray, colour: str, rng: np.random.Generator) -> None:
    """A disc of the colour, a little lighter or darker each time."""
    y, x = np.mgrid[:CELL, :CELL]
    inside = (y - CELL / 2 + 0.5) ** 2 + (x - CELL / 2 + 0.5) ** 2 < (CELL / 2 - 2) ** 2
    cell[inside] = np.clip(np.array(STAMPS[colour]) + rng.integers(-20, 21), 0, 255)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, float32[3] each, far enough apart to read."""
    while True:
        *paper, r, g, b = rng.uniform(0, 255, size=6).tolist()
        if abs(sum(paper) - (r + g + b)) >= 3 * MIN_CONTRAST:
            return np.array(paper, dtype=np.float32), np.array([r, g, b], dtype=np.float32)


def _warp(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random affine map of each image [n, side, side] about its middle, sampled bilinearly."""
    n, side = len(images), images.shape[-1]
    angle = np.radians(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES, n))
    shear, scale = rng.uniform(-MAX_SHEAR, MAX_SHEAR, n), rng.uniform(*SCALES, n)
    middle = (side - 1) / 2
    y, x = np.mgrid[:side, :side].reshape(2, 1, -1) - middle
    # From a pixel of the result back to the place of the source that it shows.
    cos, sin = (np.cos(angle) / scale)[:, None], (np.sin(angle) / scale)[:, None]
    source_x = cos * x + sin * y + shear[:, None] * (cos * y - sin * x) + middle
    source_y = cos * y - sin * x + middle

    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))  # one of paper all round; a second where x0 + 1 looks
    source_x, source_y = (np.clip(axis + 1, 0, side + 1) for axis in (source_x, source_y))
    x0, y0 = source_x.astype(np.int64), source_y.astype(np.int64)
    right, below = (source_x - x0).astype(np.float32), (source_y - y0).astype(np.float32)
    index = np.arange(n)[:, None]
    top = padded[index, y0, x0] * (1 - right) + padded[index, y0, x0 + 1] * right
    bottom = padded[index, y0 + 1, x0] * (1 - right) + padded[index, y0 + 1, x0 + 1] * right
    return (top * (1 - below) + bottom * below).reshape(n, side, side)
