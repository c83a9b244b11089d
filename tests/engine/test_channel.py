"""Verdicts through the store, two ranks in one process."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from megablip.engine.channel import SideChannel, Verdict
from megablip.engine.topology import Topology


@pytest.fixture
def store(monkeypatch):
    found = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found.port))
    return found


class Rank:
    def __init__(self, rank):
        self.verdicts, self.ended = [], threading.Event()
        self.channel = SideChannel(Topology(rank, 2, rank, torch.device("cpu")), self._end)

    def _end(self, verdict):
        self.verdicts.append(verdict)
        self.ended.set()


@pytest.mark.parametrize("poster", [0, 1])
def test_a_verdict_reaches_all_ranks(store, poster):
    ranks = [Rank(0), Rank(1)]
    verdict = Verdict("the reason", poster, dump_stacks=True)
    ranks[poster].channel.post(verdict)
    for rank in ranks:
        assert rank.ended.wait(20)
        assert rank.verdicts == [verdict]


def test_the_first_of_two_stands(store):
    ranks = [Rank(0), Rank(1)]
    threads = [threading.Thread(target=r.channel.post, args=(Verdict(f"{n}", n),)) for n, r in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for rank in ranks:
        assert rank.ended.wait(20)
    assert ranks[0].verdicts == ranks[1].verdicts


def test_closed_channels_say_nothing(store):
    ranks = [Rank(0), Rank(1)]
    for rank in ranks:
        rank.channel.close()
    assert not any(rank.verdicts for rank in ranks)
