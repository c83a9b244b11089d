import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import AutoModel

from tests.tools.test_canvases import DIGITS
from tools import tower
from tools.tower import BACKGROUND, CLASSES, make_tile, train_tower


def test_patch_classes_lie_where_the_ink_is():
    rng = np.random.default_rng(0)
    for _ in range(50):
        columns, rows = rng.integers(1, 4, size=2)
        pixels, classes = make_tile(DIGITS, columns, rows, rng)
        assert pixels.shape == (48, 48, 3)
        assert classes.shape == (36,)
        assert set(classes) <= set(range(CLASSES))


def test_full_tiles_name_each_cell_in_its_four_patches():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, classes = make_tile(DIGITS, 1, 1, rng)
        cells = classes.reshape(3, 2, 3, 2).transpose(0, 2, 1, 3).reshape(9, 4)
        assert (cells == cells[:, :1]).all()
        # Ink has a vertical spread of digit + 3 rows (see DIGITS); paper has none.
        parts = pixels.mean(axis=2).reshape(3, 16, 3, 16).transpose(0, 2, 1, 3).reshape(9, 16, 16)
        for part, digit in zip(parts, cells[:, 0], strict=True):
            if digit > BACKGROUND:
                continue  # a stamp or a smudge
            spread = np.ptp(part) > 60
            assert spread == (digit != BACKGROUND)


def test_thumbnails_are_labelled_by_the_cell_under_a_patch():
    _, classes = make_tile(DIGITS, 2, 1, np.random.default_rng(0))
    by_rows = classes.reshape(3, 2, 6)  # a cell is one patch wide and two high
    assert (by_rows[:, 0] == by_rows[:, 1]).all()


def test_a_short_training_learns_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "VALIDATION_TILES", 32)
    monkeypatch.setattr(tower, "AUGMENTED_COPIES", 1)
    monkeypatch.setattr(tower, "WARMUP_STEPS", 5)
    monkeypatch.setattr(tower, "BATCH_TILES", 16)
    monkeypatch.setattr(tower, "POSITION_WEIGHT", 3.0)  # the soonest learned
    shares = train_tower(tmp_path / "tower", steps=40, seed=0, progress=Progress(disable=True))
    assert shares["position"] > 4 / 36  # a guess gives 1/36
    model = AutoModel.from_pretrained(tmp_path / "tower")
    tiles = torch.zeros(2, 3, 48, 48)
    output = model(pixel_values=tiles)
    assert output.last_hidden_state.shape == (2, 36, 128)
    assert output.pooler_output is None


def test_the_rate_warms_up_and_decays():
    rates = [tower._lr_ratio(step, 1500) for step in range(1500)]
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[30] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert np.argmax(rates) in (29, 30)
