"""The exchange before each step. The all-reduce is replaced by the other ranks' rows, added here."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megablip.engine.symmetry import MUST_AGREE, StepReport, calls_signature, exchange, signature
from megablip.engine.topology import Topology
from megablip.errors import RankMismatchError

MINE = StepReport(
    step=5, micro_batches=2, tokens=100, documents=7, valid_labels=60, samples_done=50, data_digest=9, stop=0, failed=0
)


def exchanged(monkeypatch, mine, *others):
    """What rank 0, with report `mine`, gets; `others` are the reports of ranks 1, 2, ..."""
    calls = []

    def all_reduce(table):
        calls.append(table)
        for rank, report in enumerate(others, 1):
            table[rank] += torch.tensor(astuple(report))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    reports = exchange(mine, Topology(0, 1 + len(others), 0, torch.device("cpu")))
    assert len(calls) == 1, "one collective a step"
    return reports


def test_counts_are_summed_and_the_step_is_not(monkeypatch):
    other = replace(MINE, tokens=11, documents=1, valid_labels=0, stop=1)
    total = exchanged(monkeypatch, MINE, other, MINE).total
    assert total == replace(MINE, tokens=211, documents=15, valid_labels=120, samples_done=150, data_digest=27, stop=1)


def test_each_rank_s_value_is_there(monkeypatch):
    assert exchanged(monkeypatch, MINE, replace(MINE, tiles=3), MINE).of("tiles") == [0, 3, 0]


def test_large_counts_are_exact(monkeypatch):
    large = replace(MINE, tokens=2**53 + 1)
    assert exchanged(monkeypatch, large, large).total.tokens == 2**54 + 2


def test_digests_add_up_modulo_2_to_the_63(monkeypatch):
    large = replace(MINE, data_digest=2**63 - 1)
    assert exchanged(monkeypatch, large, large).total.data_digest == 2**63 - 2


@pytest.mark.parametrize("field", MUST_AGREE)
def test_ranks_that_differ_are_named(monkeypatch, field):
    other = replace(MINE, **{field: 9})
    with pytest.raises(RankMismatchError, match=f"ranks disagree on {field}: 9 on rank 2; ") as caught:
        exchanged(monkeypatch, MINE, MINE, other)
    assert "on ranks 0, 1" in caught.value.what
    assert "rank 0, step 5" in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize("field", [f.name for f in fields(StepReport) if f.name not in MUST_AGREE])
def test_other_fields_may_differ(monkeypatch, field):
    other = replace(MINE, **{field: 1})
    assert getattr(exchanged(monkeypatch, MINE, other).total, field) == getattr(MINE, field) + 1


def test_a_rank_that_failed_is_not_compared(monkeypatch):
    assert exchanged(monkeypatch, MINE, replace(MINE, failed=1, calls=3)).total.failed == 1


def test_signatures_differ_where_the_facts_do():
    assert signature("recipe", {"model": "a"}) == signature("recipe", {"model": "a"})
    assert signature("recipe", {"model": "a"}) != signature("recipe", {"model": "b"})
    assert 0 <= signature() < 2**63


def test_a_micro_batch_without_a_tile_makes_other_calls():
    with_tile, without = (SimpleNamespace(tiles=torch.zeros(n, 3, 1, 1)) for n in (2, 0))
    assert calls_signature([with_tile, without]) != calls_signature([with_tile, with_tile])
    assert calls_signature([with_tile]) == calls_signature([SimpleNamespace(tiles=torch.zeros(5, 3, 1, 1))])
