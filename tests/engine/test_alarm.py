"""The collective alarm, with each rank's model and a store in this process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from megablip.engine.alarm import CollectiveAlarm
from megablip.engine.topology import Topology


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.plain = nn.ReLU()
        self.second = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        return self.second(x if skip else self.plain(self.first(x)))


@pytest.fixture
def ranks():
    """(model, alarm) of three ranks, the errors they report, and a store."""
    errors = []
    models = [Model() for _ in range(3)]
    alarms = [
        CollectiveAlarm(model, Topology(rank, 3, rank, torch.device("cpu")), errors.append)
        for rank, model in enumerate(models)
    ]
    return models, alarms, errors, HashStore()


def poll(alarms, store):
    for alarm in reversed(alarms):  # the first rank compares what is there
        alarm.poll(store)


def test_ranks_that_enter_the_same_modules_agree_and_forget(ranks):
    models, alarms, errors, store = ranks
    for step in range(3):
        for model, alarm in zip(models, alarms, strict=True):
            alarm.mark_step(step)
            model(torch.ones(1, 2)).sum().backward()
        assert alarms[0]._entries[-5:] == [-(step + 1), 0, 2, 3, 1], "forward in order, backward in reverse"
        poll(alarms, store)
        poll(alarms, store)
    assert errors == []
    assert [alarm._entries for alarm in alarms] == [[], [], []]
    assert [alarm._offset for alarm in alarms] == [15, 15, 15]


def test_the_first_module_that_differs_is_named_with_its_ranks(ranks):
    models, alarms, errors, store = ranks
    for step in (6, 7):
        for rank, (model, alarm) in enumerate(zip(models, alarms, strict=True)):
            alarm.mark_step(step)
            model(torch.ones(1, 2), skip=step == 7 and rank == 1)
    poll(alarms, store)
    [error] = errors
    assert "first (forward) on rank 0, 2; second (forward) on rank 1" in str(error)
    assert "step 7" in error.where


def test_a_rank_that_is_behind_is_no_difference(ranks):
    models, alarms, errors, store = ranks
    models[0](torch.ones(1, 2))
    models[1].first(torch.ones(1, 2))
    poll(alarms, store)
    assert errors == []
    models[1].second(torch.ones(1, 2))
    models[2](torch.ones(1, 2))
    poll(alarms, store)
    poll(alarms, store)
    assert errors == []
    assert alarms[0]._offset == 2


def test_a_difference_in_the_backward_is_seen(ranks):
    models, alarms, errors, store = ranks
    for rank, model in enumerate(models):
        out = model(torch.ones(1, 2, requires_grad=True))
        if rank < 2:
            out.sum().backward()
        else:
            model(torch.ones(1, 2))
    poll(alarms, store)
    assert "second (backward) on rank 0, 1; first (forward) on rank 2" in str(errors[0])


def test_it_changes_no_gradient_and_leaves_no_hook(ranks):
    models, alarms, _, _ = ranks
    plain = Model()
    plain.load_state_dict(models[0].state_dict())
    for model in (plain, models[0]):
        model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(plain.first.weight.grad, models[0].first.weight.grad)
    alarms[0].stop()
    entries = list(alarms[0]._entries)
    models[0](torch.ones(1, 2))
    assert alarms[0]._entries == entries


def test_its_hook_runs_before_those_that_are_there():
    model, order = Model(), []
    model.first.register_forward_pre_hook(lambda *_: order.append(len(alarm._entries)))
    alarm = CollectiveAlarm(model, Topology(0, 1, 0, torch.device("cpu")), print)
    model(torch.ones(1, 2))
    assert order == [1]
