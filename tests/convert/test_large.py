"""The release's full layout goes there and back in bounded memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

FULL_LAYERS, FULL_BYTES, LAYER_BYTES = 32, 17.5e9, 4 * 113_252_352
REPOSITORY = Path(__file__).parents[2]


def python(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.large", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def converted(folder, layers):
    python("make", folder / "model", layers)
    try:
        return json.loads(python("there-and-back", folder / "model").splitlines()[-1])
    finally:
        shutil.rmtree(folder / "model")


@pytest.mark.slow
def test_the_full_layout_there_and_back(tmp_path):
    """17.4 GB, 718 tensors, fp32, both ways: 53 GB of disk, some minutes; fewer decoder layers where there is less."""
    free = shutil.disk_usage(tmp_path).free - 5e9
    layers = FULL_LAYERS - max(0, int(-(-(3 * FULL_BYTES - free) // (3 * LAYER_BYTES))))
    if layers < 1:
        pytest.skip(f"{free / 1e9:.0f} GB are free")
    if layers < FULL_LAYERS:
        warnings.warn(f"sized down to {layers} of {FULL_LAYERS} decoder layers by the disk", stacklevel=1)
    found = converted(tmp_path, layers)
    print(found)
    assert found["tensors"] == 718 - 6 * (FULL_LAYERS - layers)
    assert found["different"] == 0
    assert found["peak_anonymous_bytes"] <= 512 * 2**20
