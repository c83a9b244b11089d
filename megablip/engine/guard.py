"""What watches a rank's main thread from beside, and ends the process when it can't go on.

    watchdog          a phase of the loop takes too long: stacks of all threads, on every rank
    collective alarm  ranks enter different modules: the first module that differs
    side channel      another rank has failed: its reason, at once instead of a time-out

All three end the process from a thread, since the main thread may wait in a
collective for ever.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from megablip.config import Config
from megablip.engine.alarm import CollectiveAlarm
from megablip.engine.channel import TOLD_S, SideChannel, Verdict
from megablip.engine.status import ATTEMPT, RunStatus
from megablip.engine.topology import Topology
from megablip.engine.watchdog import Watchdog, dump_stacks
from megablip.errors import DeviceMemoryError, HangError, MegablipError, RankMismatchError

ALARM_STEPS = 5  # of a run, that the alarm watches unless asked for more
PHASES = ("data", "exchange", "step", "record", "save")


class Guard:
    """The watchers of one rank.

    Args:
        config: its `health` limits and `engine.debug_collectives`.
    """

    def __init__(self, config: Config, topology: Topology):
        self._topology, self._always = topology, config.engine.debug_collectives
        self._run_dir = Path(config.run_dir)
        self._alarm: CollectiveAlarm | None = None
        self._steps = self._step = 0
        self._channel = SideChannel(topology, self._obey, lambda store: self._alarm and self._alarm.poll(store))
        limits = config.health.limits_s(config.engine.timeout_s)
        self._watchdog = Watchdog({phase: limits[phase] for phase in PHASES}, limits["first"], self._expired)

    def watch(self, module: nn.Module) -> None:
        """Write down which modules are entered; after DeepSpeed has put its hooks on them."""
        self._alarm = CollectiveAlarm(module, self._topology, self._differ)

    def begin_step(self, step: int) -> None:
        """The main thread begins to fetch the data of a step; before any of its collectives."""
        self._step = step
        if self._alarm and not self._alarm.stopped:
            if self._steps >= ALARM_STEPS and not self._always:
                self._alarm.stop()
            else:
                self._alarm.mark_step(step)
        self._steps += 1
        self.enter("data")

    def enter(self, phase: str) -> None:
        """The main thread begins one of PHASES."""
        self._watchdog.enter(phase)

    @property
    def place(self) -> str:
        """Where in the run its main thread is."""
        return f"step {self._step}" if self._steps else "before the first step"

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because its main thread has failed, and all others with it.

        Goes straight to the system: threads of gloo and NCCL would hold up, or
        crash, the interpreter's own exit.
        """
        self._watchdog.close()
        if self._alarm and not self._alarm.stopped and not isinstance(error, MegablipError):
            # What broke the collective may be known in a moment, and then says more.
            time.sleep(TOLD_S)
        reason = f"{type(error).__name__}: {error}"
        self._note(f"rank {self._topology.rank}: {reason}")
        self._channel.post(Verdict(reason, self._topology.rank))
        _leave()

    def close(self) -> None:
        """Before this rank leaves by itself."""
        self._watchdog.close()
        self._channel.close()

    def _differ(self, error: RankMismatchError) -> None:
        text = f"RankMismatchError: {error}"
        self._say(text)
        self._channel.post(Verdict(text, self._topology.rank))

    def _expired(self, what: str) -> NoReturn:
        error = HangError(
            f"the run hangs: {what}",
            where=f"rank {self._topology.rank}, step {self._step}",
            remedy=f"see the ranks' stacks in {self._stacks.parent}; a rank without a file there was stopped or lost",
        )
        text = f"HangError: {error}"
        dump_stacks(self._stacks, what)
        self._say(text)
        self._note(text)
        self._channel.post(Verdict(text, self._topology.rank, dump_stacks=True))
        _leave()

    def _obey(self, verdict: Verdict) -> NoReturn:
        if verdict.rank != self._topology.rank:
            if verdict.dump_stacks:
                dump_stacks(self._stacks, f"rank {verdict.rank}: {verdict.text.splitlines()[0]}")
            self._say(f"rank {verdict.rank} ended the run: {verdict.text}")
        self._note(f"rank {verdict.rank}: {verdict.text}")
        _leave()

    def _note(self, reason: str) -> None:
        known = {"last_step": self._step} if self._steps else {}
        RunStatus.of_rank(self._run_dir).fail(reason, **known)

    def _say(self, text: str) -> None:
        print(f"[rank {self._topology.rank}] {text}", file=sys.stderr, flush=True)

    @property
    def _stacks(self) -> Path:
        return self._run_dir / "stacks" / f"rank_{self._topology.rank}.txt"


def end_run(error: Exception, guard: Guard | None, run_dir: Path) -> NoReturn:
    """Say what the main thread failed of, and end all ranks; without a guard, this process alone."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, MegablipError) else traceback.format_exc()
    rank = os.environ.get("RANK", "?")
    if isinstance(error, torch.OutOfMemoryError):
        error = _out_of_memory(error, f"rank {rank}, {guard.place if guard else 'at the start'}")
        text += f"{type(error).__name__}: {error}"
    print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)
    if guard:
        guard.fail(error)
    if ATTEMPT in os.environ:  # else there may be none yet
        RunStatus.of_rank(run_dir).fail(f"rank {rank}: {type(error).__name__}: {error}")
    _leave()


def _out_of_memory(error: torch.OutOfMemoryError, where: str) -> DeviceMemoryError:
    found, _, _ = str(error).partition(" If reserved but unallocated")  # what follows is about torch's own settings
    return DeviceMemoryError(
        found,
        where=where,
        remedy="set model.activation_checkpointing=1, lower batch.micro_batch_sequences, take more ranks or another "
        "engine.ds_config (zero3, zero3_offload); in a new run lower data.sequence_length or data.max_tiles",
    )


def _leave() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
