"""Parts of a step add up to it; on CUDA they are the device's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megablip.metrics import timing
from megablip.metrics.startup import STARTED, StartClock
from megablip.metrics.timing import StepTimer


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_parts_add_up_and_start_again(clock):
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.part("forward"):
            clock[0] += 2
        with timer.part("backward"):
            clock[0] += 3
        clock[0] += 1
    assert timer.take() == (12, {"forward": 4, "backward": 6})
    clock[0] += 1
    assert timer.take() == (1, {})


def test_a_part_that_fails_is_counted(clock):
    timer = StepTimer(torch.device("cpu"))

    def fail():
        with timer.part("data_wait"):
            clock[0] += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.take()[1] == {"data_wait": 2}


def test_a_watched_module_is_taken_off_the_part_around_it(clock):
    class Tower(nn.Module):
        def forward(self):
            clock[0] += 5

    timer, tower = StepTimer(torch.device("cpu")), Tower()
    timer.watch(tower, "vision", inside="forward")
    with timer.part("forward"):
        clock[0] += 1
        tower()
        clock[0] += 1
    assert timer.take() == (7, {"vision": 5, "forward": 2})


def test_on_cuda_only_the_devices_parts_take_events(clock, monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at, self.done = clock[0], False

        def synchronize(self):
            self.done = True

        def elapsed_time(self, end):
            assert self.done
            assert end.done
            return (end.at - self.at) * 1000

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    with timer.part("data_wait"):
        clock[0] += 1
    assert not made
    with timer.part("forward"):
        clock[0] += 2
    assert not any(event.done for event in made), "a part must not wait for the device"
    assert timer.take() == (3, {"data_wait": 1, "forward": 2})


def test_the_start_is_split_into_laps(monkeypatch):
    began = StartClock().laps["imports"]
    assert began > 0
    monkeypatch.setenv(STARTED, "1")  # long before this process
    clock = StartClock()
    assert clock.laps["launcher"] > 1e9
    clock.lap("engine")
    clock.lap("first step")
    assert list(clock.laps) == ["launcher", "imports", "engine", "first step"]
    assert str(clock).startswith("first step after ")
