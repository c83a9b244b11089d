import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.canvases import CELL, EMPTY, augment, draw_line, paint
from tools.digits import Digits

# Ten "digits" that can be told apart by eye of a test: d is a block d + 3 pixels high.
BLOCKS = np.zeros((10, CELL, CELL), dtype=np.float32)
for d in range(10):
    BLOCKS[d, 2 : 5 + d, 5:11] = 1
DIGITS = Digits(BLOCKS, np.arange(10), np.arange(100, 110))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(96, 48), (48, 96), (144, 48)]), st.data())
def test_a_line_says_what_was_drawn(size, data):
    width, height = size
    count = data.draw(st.integers(1, width // CELL))
    canvas = draw_line(DIGITS, width, height, count, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert canvas.pixels.shape == (height, width, 3)
    assert canvas.pixels.dtype == np.uint8
    assert [int(digit) + 100 for digit in canvas.digits] == canvas.source_ids
    x1, y1, x2, y2 = canvas.bbox
    assert x2 - x1 == pytest.approx(count * CELL / width)
    assert y2 - y1 == pytest.approx(CELL / height)
    # Paper is what most pixels are where no line is; ink is far from it, inside the box alone.
    outside = np.ones((height, width), dtype=bool)
    outside[round(y1 * height) : round(y2 * height), round(x1 * width) : round(x2 * width)] = False
    grey = canvas.pixels.mean(axis=2)
    paper = np.median(grey[outside]) if outside.any() else np.median(grey)
    drawn = np.abs(grey - paper) > 40
    assert not (drawn & outside).any()
    heights = drawn[~outside].reshape(CELL, count, CELL).sum(axis=0).max(axis=1)
    assert heights.tolist() == [int(digit) + 3 for digit in canvas.digits]


def test_paint_fills_the_named_cells():
    cells = np.full((3, 3), EMPTY)
    cells[0, 2], cells[2, 0] = 4, 7
    pixels = paint(DIGITS, cells, np.random.default_rng(0)).mean(axis=2)
    drawn = np.abs(pixels - np.median(pixels)) > 40
    assert np.array_equal(drawn.reshape(3, CELL, 3, CELL).any(axis=(1, 3)), cells != EMPTY)


def test_augment_keeps_labels_and_moves_ink_a_little():
    varied = augment(DIGITS, 3, np.random.default_rng(0))
    assert varied.pixels.shape == (30, CELL, CELL)
    assert varied.labels.tolist() == list(range(10)) * 3
    assert varied.ids.tolist() == list(range(100, 110)) * 3
    assert varied.pixels.min() >= 0
    assert varied.pixels.max() <= 1.0001
    change = np.abs(varied.pixels - np.tile(BLOCKS, (3, 1, 1))).mean(axis=(1, 2))
    assert change.min() > 0
    assert np.median(change) > 0.02
    assert change.max() < 0.2


def test_augment_without_change_is_the_identity(monkeypatch):
    monkeypatch.setattr("tools.canvases.MAX_ROTATION_DEGREES", 0)
    monkeypatch.setattr("tools.canvases.MAX_SHEAR", 0)
    monkeypatch.setattr("tools.canvases.SCALES", (1, 1))
    assert np.allclose(augment(DIGITS, 1, np.random.default_rng(0)).pixels, BLOCKS, atol=1e-6)
