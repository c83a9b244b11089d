"""What a step's micro-batches hold, and what the ranks' sums of it are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megablip.metrics import sums as module
from megablip.metrics.sums import RankFacts, StepSums, attended_pairs
from megablip.model.blip3 import PackedLoss
from tests.model.tiny import make_doc, pack, tiny_config

LAYOUT = tiny_config().layout


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    """The other rank has reported one tile, 7 visual tokens and a loss of 5 over 2 labels of source b."""

    def all_reduce(flat):
        table = flat[: 6 * 3].view(6, 3)
        table[0, 1] += 5
        table[1, 1] += 2
        table[2, :2] += 10
        flat[6 * 3 :].view(2, -1)[1] = torch.tensor([1.0, 7, 0, 2, 1, 0, 99, 0])

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)


def summed(micro_batches, losses=()):
    sums = StepSums(
        ["a", "b"], np.array([3, 4]), {"b": 1}, micro_batches, RankFacts(host_bytes=50), LAYOUT, None, (), 0, 2,
        torch.device("cpu"),
    )  # fmt: skip
    for micro_batch, loss in zip(micro_batches, losses, strict=False):
        sums.add(micro_batch, loss)
    sums.reduce()
    return sums


def loss_of(*sums):
    return PackedLoss(document_loss=torch.tensor(sums), document_labels=torch.ones(len(sums)) * 2)


def test_losses_and_counts_by_source():
    batch = pack([make_doc(10, [(2, 1), (1, 2)], 0), make_doc(20, [], 1), make_doc(5, [(2, 2)], 2)])
    batch.source = torch.tensor([0, 1, 0], dtype=torch.int32)
    sums = summed([batch], [loss_of(1.0, 3.0, 2.0)])
    assert sums.loss == pytest.approx((6 + 5) / (6 + 2))
    assert sums.loss_by_source == {"a": 3 / 4, "b": 8 / 4}
    assert sums.count("tokens") == {"a": 10 + 5 + (3 + 3 + 5) * 3, "b": 20}
    assert sums.count("images") == {"a": 3, "b": 0}
    assert sums.count("drawn") == {"a": 13, "b": 14}
    assert sums.count("bad") == {"a": 0, "b": 1}


def test_ranks_are_added_and_compared():
    sums = summed([pack([make_doc(10, [(2, 1)], 0)]), pack([make_doc(4, [], 1)])])
    assert (sums.total.tiles, sums.largest.tiles) == (3 + 1, 3)
    assert sums.total.visual_tokens == 9 + 7
    assert (sums.total.micro_batches, sums.total.dummies) == (4, 2)
    assert sums.largest.host_bytes == 99
    assert sums.total.attended_pairs == 19 * 20 // 2 + 4 * 5 // 2


def test_a_dummy_without_documents_counts_nothing():
    batch = pack([make_doc(2, [], 0)])
    batch.source = torch.tensor([-1], dtype=torch.int32)
    sums = summed([batch], [PackedLoss(document_loss=torch.zeros(1), document_labels=torch.zeros(1))])
    assert sums.count("tokens") == {"a": 0, "b": 0}
    assert sums.total.attended_pairs == 0
    assert sums.loss_by_source == {"b": 2.5}


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window):
    lengths = [1, 4, 9]
    pairs = sum(min(place + 1, window or 99) for length in lengths for place in range(length))
    assert attended_pairs(np.array(lengths), window) == pairs
