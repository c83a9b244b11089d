"""Traces of chosen steps by torch.profiler, for Perfetto, chrome://tracing or TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Writes folder/step_N.pt.trace.json.gz of each chosen step, data wait included.

    Args:
        steps: numbers of the steps, counted from 1.
        first: the step that comes next.
    """

    def __init__(self, steps: Sequence[int], folder: Path, device: torch.device, first: int):
        self._steps, self._folder = frozenset(steps), folder
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._trace: profile | None = None
        self._begin(first)

    def next(self, step: int) -> None:
        """The step before `step` is over."""
        if self._trace:
            self._trace.stop()
            path = self._folder / f"step_{step - 1:08d}.pt.trace.json.gz"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._trace.export_chrome_trace(str(path))
            except OSError as error:  # a full disk is no reason to stop training
                print(f"can't write {path}: {error}; training goes on", file=sys.stderr, flush=True)
            self._trace = None
        self._begin(step)

    def _begin(self, step: int) -> None:
        if step in self._steps:
            self._trace = profile(activities=self._activities)
            self._trace.start()
