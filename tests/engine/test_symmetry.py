"""The exchange before each step. The all-reduce is replaced by the other ranks' rows, added here."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
import torch.distributed as dist

from megablip.engine.symmetry import StepReport, exchange
from megablip.engine.topology import Topology
from megablip.errors import RankMismatchError

MINE = StepReport(step=5, micro_batches=2, tokens=100, documents=7, valid_labels=60, samples_done=50, stop=0, failed=0)


def exchanged(monkeypatch, mine, *others):
    """What rank 0, with report `mine`, gets; `others` are the reports of ranks 1, 2, ..."""
    calls = []

    def all_reduce(table):
        calls.append(table)
        for rank, report in enumerate(others, 1):
            table[rank] += torch.tensor(astuple(report))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    total = exchange(mine, Topology(0, 1 + len(others), 0, torch.device("cpu")))
    assert len(calls) == 1, "one collective a step"
    return total


def test_counts_are_summed_and_the_step_is_not(monkeypatch):
    other = replace(MINE, tokens=11, documents=1, valid_labels=0, stop=1)
    assert exchanged(monkeypatch, MINE, other, MINE) == StepReport(5, 2, 211, 15, 120, 150, 1, 0)


def test_large_counts_are_exact(monkeypatch):
    large = replace(MINE, tokens=2**53 + 1)
    assert exchanged(monkeypatch, large, large).tokens == 2**54 + 2


@pytest.mark.parametrize("field", ["step", "micro_batches"])
def test_ranks_that_differ_are_named(monkeypatch, field):
    other = replace(MINE, **{field: 9})
    with pytest.raises(RankMismatchError, match=f"ranks disagree on {field}") as caught:
        exchanged(monkeypatch, MINE, MINE, other)
    assert "2: 9" in caught.value.what
    assert "rank 0, step 5" in caught.value.where


@pytest.mark.parametrize("field", ["tokens", "documents", "valid_labels", "samples_done", "stop", "failed"])
def test_other_fields_may_differ(monkeypatch, field):
    assert getattr(exchanged(monkeypatch, MINE, replace(MINE, **{field: 1})), field) == getattr(MINE, field) + 1
