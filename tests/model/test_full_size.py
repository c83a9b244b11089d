"""The whole model at the released size: 4.36 billion parameters in bf16."""

import json
import subprocess
import sys

import psutil
import pytest


@pytest.mark.slow
def test_a_forward_in_bf16():
    """One image of 2 x 2 tiles and some text, through generation's way and training's.  A minute, 10 GB."""
    if psutil.virtual_memory().available < 12e9:
        pytest.skip("needs 12 GB of memory")
    done = subprocess.run([sys.executable, "-m", "tests.model.full_size"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["parameters"] == 428_225_600 + 109_901_568 + 3_821_130_051 - 52 * 2 * 3072 - 52  # less the dead rows
    assert found["shape"] == [1, 5 * 128 + 32, 32015]
    assert found["finite"]
    assert found["spread"] > 0.1
    assert found["packed_loss"] == pytest.approx(found["loss"], rel=0.01)
    # The weights once, in bf16: an fp32 copy would take 17 GB.
    assert found["peak_bytes"] < 2 * found["parameters"] + 2.5e9
