"""A rank that makes other calls than the rest, under ZeRO-3."""

from __future__ import annotations

import json
import re

import pytest

from tests.distributed import runs
from tests.faults.ranks import FaultyRun

NAMED_WITHIN_S = 5.0


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_rank_that_skips_a_module_is_named_on_all_ranks_within_seconds(work, precision):
    run_dir = work / f"skips-{precision}"
    run = FaultyRun("skip_sampler", runs.make_recipe(work, run_dir=str(run_dir), engine__precision=precision))
    ended = run.end()
    skipped_at = float(re.search(r"skips the sampler at ([\d.]+)", ended[1].output)[1])
    for rank in ended:
        assert rank.code == 1
        assert "RankMismatchError: ranks enter different modules: sampler (forward) on rank 0; " in rank.output
        assert "decoder.model.layers.0.input_layernorm (forward) on rank 1" in rank.output
        assert "step 1" in rank.output
        assert rank.at - skipped_at < NAMED_WITHIN_S
    [attempt] = json.loads((run_dir / "status.json").read_text())["attempts"]
    assert attempt["outcome"] == "failed"
    assert "RankMismatchError" in attempt["reason"]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_with_its_reason(work):
    """45 s."""
    ended = FaultyRun("error", runs.make_recipe(work, run_dir=str(work / "fails"))).end()
    assert [rank.code for rank in ended] == [1, 1]
    assert "rank 1 ended the run: RuntimeError: something of the last rank's own" in ended[0].output
    assert "Traceback" in ended[1].output


@pytest.mark.slow
def test_ranks_with_other_recipes_are_told_apart(work):
    """30 s; the learning rate of one rank's recipe is another."""
    ended = FaultyRun("other_recipe", runs.make_recipe(work, run_dir=str(work / "recipes"))).end()
    for rank in ended:
        assert rank.code == 1
        assert "RankMismatchError: ranks disagree on setup" in rank.output
        assert "give all ranks the same recipe" in rank.output
