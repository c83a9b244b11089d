"""DeepSpeed's inside, as megablip/engine/zero.py uses it, on real ranks."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_ranks

TOY = "tests.distributed.toy"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_state_is_bit_equal_at_any_world_size(tmp_path, precision):
    saved = run_ranks(2, f"{TOY}:save_after", str(tmp_path), precision, 4)[0]
    for world in (1, 2, 3):
        loaded = run_ranks(world, f"{TOY}:load_and_go_on", str(tmp_path), precision)[0]
        assert loaded["loaded"] == saved["saved"]
        assert all(loaded["working"].values()), "the working weights are the masters, rounded"
        if world == 2:
            assert loaded["after"] == saved["after"], "at the same world size the run goes on bit for bit"
    assert saved["after"] != saved["saved"]


def test_a_parameter_that_a_step_does_not_reach_gets_zero_gradient():
    for error in run_ranks(2, f"{TOY}:spare_gradient", "bf16"):
        assert error == 0.0


def test_floating_buffers_equal_a_plain_build():
    for found in run_ranks(2, f"{TOY}:buffers", "bf16"):
        assert found
        assert all(found.values()), found
