"""When a checkpoint is made, and how training goes on meanwhile.

    step edge      every rank copies its slices to host memory: all that training waits for
    thread         the rank writes them and syncs them to disk; no collective
    later edge     the step's control all-reduce tells that every rank has ended
    thread         the first rank commits
    later edge     the control all-reduce tells that it has; the next save may begin

A save that becomes due while one is in flight is postponed to the first step
edge after it.  Waiting for it instead would stop all ranks for the slowest disk
and make nothing safer: a crash loses one interval plus the save in flight
either way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.slices import write_slices
from megablip.config import Config
from megablip.engine.progress import Progress
from megablip.engine.rng import rng_states
from megablip.engine.symmetry import StepReport
from megablip.engine.topology import Topology
from megablip.errors import CheckpointError
from megablip.records import LocalSlice

if TYPE_CHECKING:  # takes DeepSpeed with it, seconds that the tests of this module can do without
    from megablip.engine.zero import ZeroEngine


_BLOCK_ELEMENTS = 1 << 26  # 256 MiB


class Saver:
    """Makes a run's checkpoints: by steps, by time, and at the end.

    Args:
        progress: the run's, which the loop moves on.
        base: hashes of what the run began with.
        say: prints, on the first rank only.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        engine: ZeroEngine,
        progress: Progress,
        topology: Topology,
        base: dict[str, str],
        say: Callable[[str], None],
    ):
        self._config, self._store, self._engine, self._progress = config, store, engine, progress
        self._topology, self._base, self._say = topology, base, say
        self._copy = _HostCopy(pinned=topology.device.type == "cuda")
        self._flight: _Flight | None = None
        self._due = False
        self._saved_step = progress.step  # what was resumed from need not be saved again
        self._last_began = time.monotonic()
        self._stall_s, self._saved_s = 0.0, 0.0
        if topology.is_first:  # the others write nothing before the first step's exchange
            store.sweep()

    def report(self) -> dict[str, int]:
        """This rank's fields of the StepReport."""
        ended = self._flight is not None and self._flight.task is not None and self._flight.task.ended
        return {
            "save_due": int(self._time_is_up and self._topology.is_first),
            "save_written": int(ended and not self._flight.committing),
            "save_committed": int(ended and self._flight.committing),
            "save_failed": int(ended and self._flight.task.error is not None),
        }

    def maybe_save(self, total: StepReport, lane_states: dict[int, np.ndarray]) -> None:
        """At a step edge: move the save in flight on, and begin the one that is due.

        A save that fails is reported, and tried again when the next one is due.

        Args:
            total: what the ranks told each other before the step.
            lane_states: after the step, of the lanes this rank owns.
        """
        self._stall_s = 0.0
        try:
            self._hear(total.save_written, total.save_committed, total.save_failed)
        except CheckpointError as error:
            self._say(f"checkpoint not saved, training goes on: {error}")
        step = self._progress.step
        self._due |= bool(total.save_due) or step % self._config.checkpoint.every_steps == 0
        if self._due and self._flight is None:
            self._begin(lane_states)
        elif self._due and step % self._config.checkpoint.every_steps == 0:
            self._say(f"the checkpoint of step {step} waits for that of step {self._flight.step} to be written")

    def finish(self, lane_states: dict[int, np.ndarray] | None) -> None:
        """Wait for the save in flight, and save this moment (a collective); returns when it is committed.

        Args:
            lane_states: after the last step, None if there was none since the start.

        Raises:
            CheckpointError: this moment could not be saved; earlier checkpoints are untouched.
        """
        try:
            self._settle()
        except CheckpointError as error:
            self._say(f"checkpoint not saved: {error}")
        if lane_states is not None and self._saved_step != self._progress.step:
            self._begin(lane_states)
            self._settle()

    def scalars(self) -> dict[str, float]:
        """To log with a step: how saving went up to it."""
        return {
            "checkpoint/in_flight": float(self._flight is not None),
            "checkpoint/stall_s": self._stall_s,  # that the loop waited after the step before
            "checkpoint/save_s": self._saved_s,  # from the copy to the commit, of the newest checkpoint
        }

    @property
    def _time_is_up(self) -> bool:
        minutes = self._config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._last_began >= 60 * minutes

    def _begin(self, lane_states: dict[int, np.ndarray]) -> None:
        """Copy this moment, the same step edge on all ranks, and leave the writing to a thread."""
        began, step = time.perf_counter(), self._progress.step
        slices, rng = self._copy.take(self._engine.local_slices), rng_states()
        trainer_state = {
            "progress": asdict(self._progress),
            "adam_step": self._engine.adam_step(),
            "groups": self._engine.group_settings(),
            "base": self._base,
            "world": self._topology.world,
            "sources": [source.name for source in self._config.data.sources],
            "config": self._config.model_dump(mode="json", by_alias=True),
        }
        task = _Task(lambda: self._store.write(step, lambda path: write_slices(path, slices, rng), lane_states))
        self._flight = _Flight(step, trainer_state, task, began)
        self._due, self._last_began = False, time.monotonic()
        self._stall_s = time.perf_counter() - began

    def _hear(self, written: int, committed: int, failed: int) -> None:
        """Act on how many ranks have ended their task; the same on all ranks.

        Raises:
            CheckpointError: the save in flight has failed, and its space is free again.
        """
        flight, first = self._flight, self._topology.is_first
        if flight is None or (written < self._topology.world and not committed):
            return
        if failed:
            self._flight = None
            if first:
                self._store.sweep()
            self._store.agree(flight.task.error if flight.task else None)
        elif committed:
            self._flight, self._saved_step = None, flight.step
            self._saved_s = time.perf_counter() - flight.began
            self._say(f"saved {self._store.path(flight.step)} ({self._saved_s:.1f} s)")
        else:
            flight.committing = True
            flight.task = _Task(lambda: self._store.commit(flight.step, flight.trainer_state)) if first else None

    def _settle(self) -> None:
        """Wait until no save is in flight (a collective).

        Raises:
            CheckpointError: it has failed.
        """
        while self._flight is not None:
            if self._flight.task is not None:
                self._flight.task.join()
            reports = self._topology.gather(self.report())
            self._hear(
                *(sum(report[name] for report in reports) for name in ("save_written", "save_committed", "save_failed"))
            )


class _Task(threading.Thread):
    """Something done beside the loop; its error is kept for the loop."""

    def __init__(self, act: Callable[[], None]):
        super().__init__(name="checkpoint", daemon=True)  # a rank that fails must not wait for its disk
        self._act, self.ended = act, False
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error
        self.ended = True


@dataclass
class _Flight:
    """The save in flight."""

    step: int
    trainer_state: dict[str, Any]
    task: _Task | None  # of this rank; None: others commit
    began: float
    committing: bool = False


class _HostCopy:
    """Host memory for the copy of a rank's slices, 12 bytes a parameter; made once, new pages cost more than copies.

    In blocks of a power of two: torch rounds pinned memory up to one, and would
    take up to twice as much for a single piece.

    Args:
        pinned: slices come from a device; pinned memory takes them at the full speed of the bus.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self._number = self._used = 0  # the block that is being filled, and its elements that are taken

    def take(self, slices: Callable[[], Iterable[LocalSlice]]) -> list[LocalSlice]:
        """Copies that stay as they are until the next call."""
        copied, self._number, self._used = [], 0, 0
        # One slice after the other is asked for: an off-loaded one is a copy on the device by itself.
        for piece in slices():
            tensors = {}
            for kind, values in piece.tensors.items():
                tensors[kind] = self._room(values.numel())
                tensors[kind].copy_(values, non_blocking=True)
            copied.append(replace(piece, tensors=tensors))
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _room(self, numel: int) -> torch.Tensor:
        """The next `numel` elements that follow each other."""
        while self._number < len(self._blocks):
            block = self._blocks[self._number]
            if self._used + numel <= len(block):
                self._used += numel
                return block[self._used - numel : self._used]
            self._number, self._used = self._number + 1, 0
        length = max(_BLOCK_ELEMENTS, 1 << (numel - 1).bit_length())
        self._blocks.append(torch.empty(length, pin_memory=self._pinned))
        return self._room(numel)
