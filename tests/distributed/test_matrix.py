"""Every strategy at every world size and precision: train, save, kill, load under every other, compare.

What of DeepSpeed's inside layouts.py uses is pinned here.
"""

from __future__ import annotations

import json
from itertools import product

import pytest

from tests.distributed import matrix
from tests.distributed.ranks import run_ranks

STRATEGIES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz"]
CELLS = [cell for cell in product(STRATEGIES, ["fp32", "bf16"]) if cell != ("zero0", "bf16")]  # that one is refused


def run_matrix(folder, save_worlds, load_worlds, cells) -> None:
    for world in save_worlds:
        with pytest.raises(AssertionError, match="ended with -9"):
            run_ranks(world, "tests.distributed.matrix:save_cells", str(folder), cells, timeout_s=600)
    saved = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(saved) == len(save_worlds) * len(cells)
    expected = matrix.reference()
    for cell, facts in saved.items():
        exact = "fp32" in cell
        assert facts["norms"] == pytest.approx(expected["norms"], rel=1e-5 if exact else 2e-2), cell
        assert facts["after_skip"] == facts["saved"], f"{cell}: a skipped step changed the state"
        assert facts["adam_step"] == matrix.STEPS - 1, f"{cell}: a skipped step was counted"
        if exact:
            for key, values in facts["state"].items():
                assert values == pytest.approx(expected["state"][key], rel=1e-4, abs=2e-6), f"{cell}: {key}"
    for world in load_worlds:
        for wrong in run_ranks(world, "tests.distributed.matrix:load_cells", str(folder), cells, timeout_s=900):
            assert wrong == []


def test_some_of_the_matrix(tmp_path):
    cells = [("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3_offload", "fp32")]
    run_matrix(tmp_path, [2], [3], cells)


@pytest.mark.slow
def test_the_matrix(tmp_path):
    """All strategies and precisions, saved and loaded by one to four ranks: 44 cells, 976 loads, about 6 minutes."""
    run_matrix(tmp_path, [1, 2, 3, 4], [1, 2, 3, 4], CELLS)
