"""From shards to micro-batches: processes, hand-over, state.

    planner --(which documents)--> decode workers --(pixels)--> rank: collate, prefetch

A rank has one planner process and a pool of decode workers; a thread of the
rank collects their sequences in order and keeps whole steps ready.  Hand-over
goes one way only, through pipes that block when full: so memory is bounded and
nothing can deadlock.  Sequence j of a rank is decoded by worker j mod workers.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from megablip.config import Config
from megablip.data.collate import collate
from megablip.data.pack import LaneState
from megablip.data.shards import expand_shards
from megablip.data.workers import Failure, Helper, Setup, start_helper, with_traceback
from megablip.errors import CheckpointError, MegablipError, SampleError
from megablip.records import MicroBatch, PackedSequence, Skip, VisualLayout

POLL_S = 1.0  # how often a rank looks whether its helpers live


@dataclass(slots=True)
class StepBatch:
    """A rank's share of one global batch.

    `lane_states` are those after this step: a checkpoint made after it stores them.
    """

    step: int  # from 0
    micro_batches: list[MicroBatch]
    lane_states: dict[int, np.ndarray]
    documents: int
    tokens: int
    valid_labels: int
    skipped: tuple[Skip, ...]
    data_wait_s: float = 0.0


def owned_lanes(lanes: int, rank: int, world: int) -> range:
    """The contiguous lanes of a rank; where `world` does not divide them, the first ranks have one more."""
    share, rest = divmod(lanes, world)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def micro_batches_per_step(config: Config, world: int) -> int:
    """Micro-batches of a step, the same on all ranks: those with fewer lanes fill up with dummies."""
    sequences = len(owned_lanes(config.batch.lanes, 0, world)) * config.batch.sequences_per_lane
    return -(-sequences // config.batch.micro_batch_sequences)


class Quarantine:
    """Writes skipped samples to RUN/quarantine.jsonl and stops the run when they are too many.

    Of one source, max(32, 0.1 %) of its samples may be bad; a sample that
    comes again in a later epoch counts once.

    Args:
        path: file that lines are appended to, by all ranks.
        totals: samples of each source, by name.
    """

    def __init__(self, path: Path, totals: dict[str, int]):
        self._path, self._totals = path, totals
        self._bad: dict[str, dict[tuple[str, str], Skip]] = defaultdict(dict)

    def add(self, step: int, skipped: tuple[Skip, ...]) -> None:
        """
        Raises:
            SampleError: a source has too many bad samples.
        """
        if not skipped:
            return
        lines = [
            {"step": step, "source": s.source, "shard": s.shard, "key": s.key, "offset": s.offset, "error": s.error}
            for s in skipped
        ]
        self._append("".join(json.dumps(line) + "\n" for line in lines))
        for skip in skipped:
            self._bad[skip.source][skip.shard, skip.key] = skip
        for source, bad in self._bad.items():
            limit = max(32, self._totals[source] // 1000)
            if len(bad) > limit:
                last = [f"  {s.shard}, key {s.key}: {s.error.splitlines()[0]}" for s in list(bad.values())[-5:]]
                raise SampleError(
                    f"{len(bad)} bad samples, more than the {limit} allowed; the last:\n" + "\n".join(last),
                    where=f"source {source}, step {step}",
                    remedy=f"see {self._path}; repair the source or take it out of data.sources",
                )

    def _append(self, text: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text.encode())  # in one piece: other ranks append, too
            finally:
                os.close(descriptor)
        except OSError as error:  # a full disk: no reason to stop training
            print(f"can't write {self._path}: {error}; the skipped samples:\n{text}", file=sys.stderr, flush=True)


class Loader:
    """Iterates over a rank's StepBatches, without end.

    Use as a context manager or call `close`.

    Args:
        config: the run.
        tokenizer_path: folder of the tokenizer.
        layout: how images become tiles.
        rank, world: data-parallel rank and their number.
        lane_states: states to go on from, at least of this rank's lanes; None starts at the beginning.
        start_step: number of steps that the states come after.

    Raises:
        ShardError: shards are missing or (when iterated) damaged.
        CheckpointError: the states are not those of `start_step`.
        MegablipError: when iterated, a helper process failed; its traceback is in the message.
    """

    def __init__(
        self,
        config: Config,
        tokenizer_path: str,
        layout: VisualLayout,
        rank: int,
        world: int,
        lane_states: dict[int, np.ndarray] | None,
        start_step: int = 0,
    ):
        self._config, self._layout, self._rank = config, layout, rank
        self._lanes = owned_lanes(config.batch.lanes, rank, world)
        self._micro_batches = micro_batches_per_step(config, world)
        self._ready: deque[StepBatch] = deque()
        self._changed = threading.Condition()  # guards _ready, _failure and _closed
        self._failure: MegablipError | None = None
        self._closed = False
        setup = Setup(
            data=config.data,
            lanes=config.batch.lanes,
            sequences_per_lane=config.batch.sequences_per_lane,
            seed=config.seed,
            tokenizer_path=str(tokenizer_path),
            layout=layout,
            shards=[expand_shards(source.shards) for source in config.data.sources],
            lane_states={lane: _state_of(lane_states, lane, config, start_step) for lane in self._lanes},
        )
        self._start_helpers(setup)
        self._thread = threading.Thread(target=self._collect, args=(start_step,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            if self._closed:
                raise StopIteration
            if self._failure:
                raise self._failure
            batch = self._ready.popleft()
            self._changed.notify_all()
        batch.data_wait_s = time.perf_counter() - began
        self._quarantine.add(batch.step, batch.skipped)  # only now: what is merely prefetched comes again on resume
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helpers at once; they hold nothing worth saving."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for helper in self._helpers:
            helper.process.kill()
        for helper in self._helpers:
            helper.process.wait()
        self._thread.join()
        for helper in self._helpers:
            helper.lifeline.close()
            helper.output.close()

    def _start_helpers(self, setup: Setup) -> None:
        task_pipes = [Pipe(duplex=False) for _ in range(self._config.data.decode_workers)]
        writes = [write for _, write in task_pipes]
        self._planner = start_helper("planner", f"planner of rank {self._rank}", setup, writes)
        setup = replace(setup, lane_states={})  # the planner's alone, and large
        self._workers = [
            start_helper("worker", f"decode worker {number} of rank {self._rank}", setup, [read])
            for number, (read, _) in enumerate(task_pipes)
        ]
        self._helpers = [self._planner, *self._workers]
        for connection in itertools.chain(*task_pipes):
            connection.close()  # the helpers have their own; an end is seen only when no one else holds it

    def _collect(self, step: int) -> None:
        """Body of the thread: assemble steps and keep them ready."""
        try:
            totals = self._receive(self._planner)
            self._quarantine = Quarantine(Path(self._config.run_dir) / "quarantine.jsonl", totals)
            outputs = itertools.cycle(self._workers)
            for number in itertools.count(step):
                batch = self._assemble(number, outputs)
                with self._changed:
                    while len(self._ready) >= self._config.data.prefetch_steps and not self._closed:
                        self._changed.wait(POLL_S)
                        self._check_alive()
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self._failure = with_traceback(error, f"loader of rank {self._rank}")
                self._changed.notify_all()

    def _assemble(self, step: int, outputs: Iterator[Helper]) -> StepBatch:
        count = len(self._lanes) * self._config.batch.sequences_per_lane
        sequences: list[PackedSequence] = [self._receive(next(outputs)) for _ in range(count)]
        size = self._config.batch.micro_batch_sequences
        micro_batches = [
            collate(sequences[number * size : (number + 1) * size], self._layout)
            for number in range(self._micro_batches)
        ]
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            lane_states={sequence.lane: sequence.lane_state for sequence in sequences},  # the last of a lane stays
            documents=sum(len(sequence.documents) for sequence in sequences),
            tokens=sum(sequence.tokens for sequence in sequences),
            valid_labels=sum(micro_batch.valid_labels for micro_batch in micro_batches),
            skipped=tuple(skip for sequence in sequences for skip in sequence.skipped),
        )

    def _receive(self, helper: Helper) -> Any:
        """The helper's next message."""
        while not wait([helper.output], POLL_S):
            self._check_alive()
        try:
            message = helper.output.recv()
        except (EOFError, OSError):
            raise self._cause() from None
        if isinstance(message, Failure):
            raise message.error
        return message

    def _check_alive(self) -> None:
        if any(helper.process.poll() is not None for helper in self._helpers):
            raise self._cause()

    def _cause(self) -> Exception:
        """Why helpers ended: the first failure that one reported, else the first that was killed.

        One that ends takes the others with it, as their pipes break; those end quietly.
        """
        deadline = time.monotonic() + POLL_S
        while time.monotonic() < deadline and any(helper.process.poll() is None for helper in self._helpers):
            time.sleep(0.02)
        ended = [helper for helper in self._helpers if helper.process.poll() is not None]
        for helper in ended:
            if failure := helper.last_words():
                return failure.error
        for helper in sorted(ended, key=lambda helper: helper.process.returncode == 0):
            code = helper.process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return MegablipError(
                f"the {helper.name} {how}",
                where=f"process {helper.process.pid}",
                remedy="if memory ran out (see dmesg), lower data.decode_workers or data.prefetch_steps; "
                "else see its last lines on stderr",
            )
        return MegablipError("a pipe to the loader's helpers broke", where=f"rank {self._rank}", remedy="start again")


def _state_of(
    lane_states: dict[int, np.ndarray] | None, lane: int, config: Config, start_step: int
) -> np.ndarray | None:
    if lane_states is None and start_step == 0:
        return None
    if lane_states is None or lane not in lane_states:
        raise CheckpointError(
            "the checkpoint holds no data state of a lane",
            where=f"lane {lane}, step {start_step}",
            remedy="use another checkpoint",
        )
    index = LaneState.from_vector(lane_states[lane]).index
    if index != start_step * config.batch.sequences_per_lane:
        raise CheckpointError(
            f"the data state comes after {index} sequences of a lane, which is not the end of step {start_step}",
            where=f"lane {lane}",
            remedy="use another checkpoint",
        )
    return lane_states[lane]
