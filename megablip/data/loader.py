"""From shards to the micro-batches of a rank's steps.

    planner --> decode workers --> [this thread: collate, prefetch] --> training loop

A thread of the rank collects the sequences in order and keeps whole steps
ready.  Hand-over goes one way only and blocks when full: so memory is bounded
and nothing can deadlock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from megablip.config import Config
from megablip.data.collate import TileMemory, collate
from megablip.data.lanes import LaneState
from megablip.data.quarantine import Quarantine
from megablip.data.samples import Setup
from megablip.data.shards import expand_shards
from megablip.data.workers import POLL_S, InlinePipeline, Pipeline, ProcessPipeline, with_traceback
from megablip.errors import CheckpointError, MegablipError
from megablip.records import DIGESTS, MicroBatch, PackedSequence, Skip, VisualLayout

MAX_STEPS_AHEAD = 8  # more even out nothing, and where steps are small they would cost the training thread its time


@dataclass
class StepBatch:
    """A rank's share of one global batch.

    `lane_states` are those after this step: a checkpoint made after it stores them.
    """

    step: int  # from 0
    micro_batches: list[MicroBatch] = field(default_factory=list)
    lane_states: dict[int, np.ndarray] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    valid_labels: int = 0
    samples_drawn: np.ndarray | int = 0  # int64[sources], since the start of the run, by this rank's lanes
    samples_done: int = 0  # of those, all that no longer wait
    samples_dropped: int = 0  # of those, the ones that no sequence can hold
    data_digest: int = 0  # sum of its sequences' digests mod 2^63; the sum over all ranks is that of the global batch
    skipped: tuple[Skip, ...] = ()
    data_wait_s: float = 0.0

    @cached_property
    def bytes(self) -> int:
        """Host memory of the tensors; asked for once all of them are there."""
        tensors = (getattr(micro_batch, f.name) for micro_batch in self.micro_batches for f in fields(micro_batch))
        return sum(tensor.nbytes for tensor in tensors if hasattr(tensor, "nbytes"))


def owned_lanes(lanes: int, rank: int, world: int) -> range:
    """The contiguous lanes of a rank; where `world` does not divide them, the first ranks have one more."""
    share, rest = divmod(lanes, world)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def micro_batches_per_step(config: Config, world: int) -> int:
    """Micro-batches of a step, the same on all ranks: those with fewer lanes fill up with dummies."""
    sequences = len(owned_lanes(config.batch.lanes, 0, world)) * config.batch.sequences_per_lane
    return -(-sequences // config.batch.micro_batch_sequences)


def setup_of(
    config: Config,
    tokenizer_path: str,
    layout: VisualLayout,
    lanes: Iterable[int],
    lane_states: dict[int, np.ndarray] | None,
    start_step: int,
) -> Setup:
    """What planning and decoding some lanes of a run needs; raises what `Loader` does."""
    return Setup(
        data=config.data,
        lanes=config.batch.lanes,
        sequences_per_lane=config.batch.sequences_per_lane,
        seed=config.seed,
        epochs=config.duration.value if config.duration.unit == "epochs" else None,
        allow_source_changes="data.sources" in config.allow_changes,
        tokenizer_path=str(tokenizer_path),
        layout=layout,
        shards=[expand_shards(source.shards) for source in config.data.sources],
        lane_states={lane: _state_of(lane_states, lane, config, start_step) for lane in lanes},
    )


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
        pin_memory: hand over tensors in pinned memory, for copies to a device.

    Raises:
        ShardError: shards are missing or (when iterated) can't be used.
        CheckpointError: the states are not those of `start_step`.
        SampleError: when iterated, too many samples in a row can't be used; what was skipped is written down.
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
        *,
        pin_memory: bool = False,
    ):
        self._config, self._layout, self._rank = config, layout, rank
        self._lanes = owned_lanes(config.batch.lanes, rank, world)
        self._micro_batches = micro_batches_per_step(config, world)
        self._memory = TileMemory(pin_memory)
        self._gpu = _current_gpu() if pin_memory else None
        self._ready: deque[StepBatch] = deque()
        self._changed = threading.Condition()  # guards _ready, _failure and _closed
        self._failure: tuple[int, MegablipError] | None = None  # and the step that it came instead of
        self._closed = False
        setup = setup_of(config, tokenizer_path, layout, self._lanes, lane_states, start_step)
        self.quarantine = Quarantine(Path(config.run_dir) / "quarantine.jsonl", is_first=rank == 0)
        self.samples: dict[str, int] = {}
        """Samples of each source that is counted; known once the first batch was given."""
        self._pipeline: Pipeline = self._open(setup)
        self._thread = threading.Thread(target=self._collect, args=(start_step,), daemon=True, name="loader")
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            if self._closed:
                raise StopIteration
            if not self._ready:
                step, error = self._failure
                self.quarantine.add(step, error.skipped)
                error.skipped = ()
                raise error
            batch = self._ready.popleft()
            self._changed.notify_all()
        batch.data_wait_s = time.perf_counter() - began
        self.quarantine.add(batch.step, batch.skipped)  # only now: what is merely prefetched comes again on resume
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helpers at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pipeline.stop()
        self._thread.join()
        self._pipeline.close()

    def _open(self, setup: Setup) -> Pipeline:
        workers = self._config.data.decode_workers
        if not workers:
            return InlinePipeline(setup)
        return ProcessPipeline(setup, workers, self._config.batch.micro_batch_sequences, self._kept(), self._rank)

    def _kept(self) -> int:
        """Sequences whose tiles are used where the workers put them: all, as a rule, where micro-batches are of one."""
        batch, data = self._config.batch, self._config.data
        if self._memory.pinned or batch.micro_batch_sequences > 1:
            return 0
        ready = data.prefetch_bytes // (data.max_tiles * self._layout.tile_bytes)
        # Beside those that are ready one step is put together, and the training loop may have the last two.
        return min(ready, MAX_STEPS_AHEAD * self._micro_batches) + 3 * self._micro_batches

    def _collect(self, step: int) -> None:
        """Body of the thread: assemble steps and keep them ready."""
        batch = StepBatch(step)
        try:
            if self._gpu is not None:
                _use_gpu(self._gpu)
            self.samples = self._pipeline.totals()
            while True:
                self._assemble(batch)
                with self._changed:
                    while self._is_full(batch) and not self._closed:
                        self._changed.wait(POLL_S)
                        self._pipeline.check()
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
                batch = StepBatch(batch.step + 1)
        except Exception as error:
            failure = with_traceback(error, f"loader of rank {self._rank}")
            failure.skipped = batch.skipped + failure.skipped
            with self._changed:
                self._failure = batch.step, failure
                if self._ready:  # told at once, since these may take long
                    ready = f"the {len(self._ready)} steps that are ready come first"
                    print(f"loader of rank {self._rank} has failed, {ready}: {failure}", flush=True)
                self._changed.notify_all()

    def _is_full(self, batch: StepBatch) -> bool:
        """Whether a further step would pass the budget; one is always kept, the loss needs its count of labels."""
        ready = sum(waiting.bytes for waiting in self._ready)
        over = ready + batch.bytes > self._config.data.prefetch_bytes
        return bool(self._ready) and (over or len(self._ready) >= MAX_STEPS_AHEAD)

    def _assemble(self, batch: StepBatch) -> None:
        left = len(self._lanes) * self._config.batch.sequences_per_lane
        for _ in range(self._micro_batches):
            count = min(left, self._config.batch.micro_batch_sequences)
            left -= count
            self._add_micro_batch(batch, count)
        states = [LaneState(state) for state in batch.lane_states.values()]
        batch.samples_drawn = sum(state.drawn for state in states)
        batch.samples_done = sum(state.samples_done for state in states)
        batch.samples_dropped = sum(state.dropped for state in states)
        batch.data_digest %= DIGESTS

    def _add_micro_batch(self, batch: StepBatch, count: int) -> None:
        sequences = [self._take(batch) for _ in range(count)]
        micro_batch = collate(sequences, self._layout, self._memory, keep_tiles=self._pipeline.may_keep())
        batch.micro_batches.append(micro_batch)
        batch.valid_labels += micro_batch.valid_labels

    def _take(self, batch: StepBatch) -> PackedSequence:
        """The next sequence, which the batch counts."""
        sequence = self._pipeline.take()
        batch.lane_states[sequence.lane] = sequence.lane_state  # the last of a lane stays
        batch.skipped += sequence.skipped
        batch.documents += len(sequence.doc_lens)
        batch.tokens += sequence.tokens
        batch.data_digest += sequence.digest
        return sequence


def _current_gpu() -> int:
    import torch

    return torch.cuda.current_device()


def _use_gpu(number: int) -> None:
    """In a thread, which begins on GPU 0: there pinned memory would make a context, 0.5 GB of each rank on one GPU."""
    import torch

    torch.cuda.set_device(number)


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
    index = LaneState(lane_states[lane]).index
    if index != start_step * config.batch.sequences_per_lane:
        raise CheckpointError(
            f"the data state comes after {index} sequences of a lane, which is not the end of step {start_step}",
            where=f"lane {lane}",
            remedy="use another checkpoint",
        )
    return lane_states[lane]
