"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

ON_DEVICE = ("vision", "forward", "backward", "optimizer")
"""Parts that a device computes; where there is one, its own clock times them."""

Mark = Any
"""A moment: seconds of this process's clock, or a CUDA event."""


class StepTimer:
    """Adds up the seconds of each part of the loop.

    On CUDA the parts of ON_DEVICE are timed by events, which cost no
    synchronisation: they are read in `take`, after the step's own one.

    Args:
        device: that the model runs on.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark, int]] = []
        self._taken = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`, also in a profiler's trace; parts lie beside each other, never inside."""
        mark = self._mark(name)
        try:
            with record_function(name):
                yield
        finally:
            self._spans.append((name, mark, self._mark(name), 1))

    def watch(self, module: nn.Module, name: str, inside: str) -> None:
        """Count the module's forward as `name`, and no more as the part that it runs inside of."""
        marks = []
        module.register_forward_pre_hook(lambda *_: marks.append(self._mark(name)))

        def done(*_: object) -> None:
            span = marks.pop(), self._mark(name)
            self._spans.append((name, *span, 1))
            self._spans.append((inside, *span, -1))

        module.register_forward_hook(done)

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and those of each part; they start from zero again."""
        parts: defaultdict[str, float] = defaultdict(float)
        for name, start, end, sign in self._spans:
            parts[name] += sign * _seconds(start, end)
        self._spans.clear()
        now = time.perf_counter()
        total, self._taken = now - self._taken, now
        return total, dict(parts)

    def _mark(self, name: str) -> Mark:
        if not (self._on_cuda and name in ON_DEVICE):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        return end - start
    for event in (start, end):
        event.synchronize()
    return start.elapsed_time(end) / 1000
