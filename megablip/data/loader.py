"""From shards to micro-batches: processes, hand-over, state.

    planner --(which documents)--> decode workers --(pixels)--> rank: collate, prefetch

A rank has one planner process and a pool of decode workers; a thread of the
rank collects their sequences in order and keeps whole steps ready.  Hand-over
goes one way only, through pipes that block when full: so memory is bounded and
nothing can deadlock.  Sequence j of a rank is decoded by worker j mod workers.

The helpers are plain subprocesses rather than `multiprocessing` ones: those
import the parent's main module, which is the trainer with torch and DeepSpeed
(2 s and 200 MB for each of them), and forking a rank, which has threads, is unsafe.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megablip.config import Config, DataConfig
from megablip.data.encode import Encoder
from megablip.data.order import SourceOrder
from megablip.data.pack import LanePlanner, LaneState
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import CheckpointError, MegablipError, PackingError, SampleError
from megablip.records import (
    IGNORE_LABEL,
    DecodedDocument,
    EncodedDocument,
    MicroBatch,
    PackedSequence,
    PlannedDocument,
    SampleAddress,
    Skip,
    VisualLayout,
)

if TYPE_CHECKING:
    from torch import Tensor

POLL_S = 1.0  # how often a rank looks whether its helpers live
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # meant for the ranks, which decide what to do


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


# --- micro-batches ------------------------------------------------------------


def collate(sequences: list[PackedSequence], layout: VisualLayout) -> MicroBatch:
    """Lay the documents of sequences end to end.

    Without any document there is a dummy one of one token that has no label;
    without any image a dummy tile, with `dummy` set and no visual token
    (its `tile_to_image` is -1).

    Raises:
        PackingError: a document's visual tokens are not those of its tiles.
    """
    import torch  # here, for the helpers don't need it

    documents = [document for sequence in sequences for document in sequence.documents]
    for document in documents:
        _check_slots(document, layout)
    documents = documents or [_dummy_document(layout)]
    tiles = [len(document.tiles) for document in documents]
    dummy = not sum(tiles)
    side, patches = layout.tile_size, layout.patches_per_tile
    doc_lens = [len(document.input_ids) for document in documents]
    cu_seqlens = np.cumsum([0, *doc_lens])
    starts = cu_seqlens[:-1]
    labels = np.concatenate([document.labels for document in documents]).astype(np.int64)
    labels[starts] = IGNORE_LABEL  # nothing before a document's first token predicts it
    grids = np.concatenate([document.grids for document in documents])
    visual = [document.visual_positions + start for document, start in zip(documents, starts, strict=True)]

    def tensor(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))

    return MicroBatch(
        input_ids=tensor(np.concatenate([document.input_ids for document in documents]), np.int64),
        labels=tensor(labels, np.int64),
        position_ids=tensor(np.arange(cu_seqlens[-1]) - np.repeat(starts, doc_lens), np.int64),
        cu_seqlens=tensor(cu_seqlens, np.int32),
        doc_lens=doc_lens,
        max_seqlen=max(doc_lens),
        source=tensor(np.array([document.source for document in documents]), np.int32),
        pair=tensor(np.full(len(documents), -1), np.int32),
        tiles=tensor(
            np.zeros((1, 3, side, side)) if dummy else np.concatenate([document.tiles for document in documents]),
            np.uint8,
        ),
        patch_mask=tensor(
            np.ones((1, patches)) if dummy else np.concatenate([document.patch_mask for document in documents]),
            np.bool_,
        ),
        tile_to_image=tensor(
            np.array([-1]) if dummy else np.repeat(np.arange(len(grids)), 1 + grids.prod(axis=1)), np.int32
        ),
        grid=tensor(grids, np.int32),
        visual_token_index=tensor(np.concatenate(visual), np.int64),
        keys=[document.key for document in documents],
        dummy=dummy,
    )


def _check_slots(document: DecodedDocument, layout: VisualLayout) -> None:
    slots, tiles = len(document.visual_positions), len(document.tiles)
    by_grid = int((1 + document.grids.prod(axis=1)).sum())
    if slots != tiles * layout.tokens_per_tile or by_grid != tiles:
        raise PackingError(
            f"{slots} visual tokens for {tiles} tiles of {layout.tokens_per_tile} tokens each ({by_grid} by the grids)",
            where=f"source {document.source}, key {document.key}",
            remedy="this is a fault of the encoder: report it with the sample",
        )


def _dummy_document(layout: VisualLayout) -> DecodedDocument:
    return DecodedDocument(
        input_ids=np.zeros(1, np.int32),
        labels=np.full(1, IGNORE_LABEL, np.int32),
        visual_positions=np.zeros(0, np.int32),
        tiles=np.zeros((0, 3, layout.tile_size, layout.tile_size), np.uint8),
        patch_mask=np.zeros((0, layout.patches_per_tile), bool),
        grids=np.zeros((0, 2), np.int32),
        source=-1,
        key="",
    )


# --- bad samples ----------------------------------------------------------------


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
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode())  # in one piece: other ranks append, too
        finally:
            os.close(descriptor)
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


# --- the rank's side ------------------------------------------------------------


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
        self._failure: BaseException | None = None
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
        workers = self._config.data.decode_workers
        task_pipes = [Pipe(duplex=False) for _ in range(workers)]
        self._planner = _start("planner", f"planner of rank {self._rank}", setup, [write for _, write in task_pipes])
        self._workers = [
            _start("worker", f"decode worker {number} of rank {self._rank}", setup, [read])
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
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _assemble(self, step: int, outputs: Iterator[_Helper]) -> StepBatch:
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

    def _receive(self, helper: _Helper) -> Any:
        """The helper's next message."""
        while not wait([helper.output], POLL_S):
            self._check_alive()
        try:
            message = helper.output.recv()
        except (EOFError, OSError):
            raise self._cause() from None
        if isinstance(message, _Failure):
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
            remedy="use another",
        )
    index = LaneState.from_vector(lane_states[lane]).index
    if index != start_step * config.batch.sequences_per_lane:
        raise CheckpointError(
            f"the data state comes after {index} sequences of a lane, which is not the end of step {start_step}",
            where=f"lane {lane}",
            remedy="use another checkpoint",
        )
    return lane_states[lane]


# --- helper processes -----------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a helper is told when it starts."""

    data: DataConfig
    lanes: int
    sequences_per_lane: int
    seed: int
    tokenizer_path: str
    layout: VisualLayout
    shards: list[list[str]]  # of each source
    lane_states: dict[int, np.ndarray | None]  # of the lanes to plan, in order


@dataclass(frozen=True)
class _Failure:
    """Last message of a helper."""

    error: MegablipError


@dataclass
class _Helper:
    name: str
    process: subprocess.Popen
    lifeline: Connection  # the helper ends when this is closed, as it is when the rank dies
    output: Connection

    def last_words(self) -> _Failure | None:
        try:
            while self.output.poll():
                message = self.output.recv()
                if isinstance(message, _Failure):
                    return message
        except (EOFError, OSError):
            pass
        return None


def _start(role: str, name: str, setup: Setup, connections: list[Connection]) -> _Helper:
    """Start a helper that has `connections` beside its lifeline and its output."""
    lifeline_end, lifeline = Pipe(duplex=False)
    output, output_end = Pipe(duplex=False)
    descriptors = [connection.fileno() for connection in (lifeline_end, output_end, *connections)]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the helper inherits it: no moment is left open
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", "from megablip.data.loader import helper_main; helper_main()", role]
            + [str(descriptor) for descriptor in descriptors],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    lifeline_end.close()
    output_end.close()
    lifeline.send((name, setup))
    return _Helper(name, process, lifeline, output)


def helper_main() -> None:
    """Entry of a helper process; the command line is role, lifeline, output, further pipes."""
    faulthandler.enable()
    role, lifeline_fd, output_fd, *descriptors = sys.argv[1:]
    lifeline = Connection(int(lifeline_fd), writable=False)
    output = Connection(int(output_fd), readable=False)
    name, setup = lifeline.recv()
    threading.Thread(target=_end_with_rank, args=(lifeline,), daemon=True).start()
    try:
        if role == "planner":
            _plan(setup, output, [Connection(int(fd), readable=False) for fd in descriptors])
        else:
            _work(setup, Connection(int(descriptors[0]), writable=False), output)
    except (EOFError, BrokenPipeError):
        pass  # the process at the other end is gone, and the rank knows why
    except Exception as error:
        if not isinstance(error, MegablipError):
            error = MegablipError(f"the {name} failed:\n{traceback.format_exc()}", remedy="report this")
        output.send(_Failure(error))
        sys.exit(1)


def _end_with_rank(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(0)


def _plan(setup: Setup, output: Connection, tasks: list[Connection]) -> None:
    """Planner: send sequences to the workers in turn, each with what was skipped on the way to it."""
    reader = _SampleReader(setup)
    output.send({source.name: source.total for source in reader.sources})
    orders = [SourceOrder(source.name, source.counts, setup.lanes, setup.seed) for source in reader.sources]
    skipped: list[Skip] = []

    def measure(address: SampleAddress) -> tuple[int, int]:
        document = reader.encoded(address)
        return len(document.input_ids), document.tiles

    def on_skip(address: SampleAddress, error: SampleError) -> None:
        skipped.append(reader.skip(address, error))

    planners = [
        LanePlanner(lane, setup.data, setup.seed, orders, measure, on_skip, state)
        for lane, state in setup.lane_states.items()
    ]
    workers = itertools.cycle(tasks)
    while True:
        for _ in range(setup.sequences_per_lane):  # index-major, then lane
            for planner in planners:
                planned = planner.next_sequence()
                next(workers).send((planned, tuple(skipped)))
                skipped.clear()


def _work(setup: Setup, tasks: Connection, output: Connection) -> None:
    """Decode worker: turn planned sequences into packed ones."""
    reader = _SampleReader(setup)
    while True:
        planned, skipped = tasks.recv()
        documents = []
        for document in planned.documents:
            try:
                documents.append(reader.decoded(document))
            except SampleError as error:
                skipped += (reader.skip(document.address, error),)
        output.send(PackedSequence(planned.lane, planned.index, tuple(documents), skipped, planned.lane_state))


class _SampleReader:
    """Samples by address, through schema and encoder."""

    def __init__(self, setup: Setup):
        self.sources = [
            ShardSource(source.name, shards) for source, shards in zip(setup.data.sources, setup.shards, strict=True)
        ]
        self._schemas = [SCHEMAS[source.schema_name] for source in setup.data.sources]
        self._encoder = Encoder(setup.tokenizer_path, setup.layout)

    def encoded(self, address: SampleAddress) -> EncodedDocument:
        source = self.sources[address.source]
        key, members = source.read(address.shard, address.sample)
        return self._encoder.encode(self._schemas[address.source](members, source.name, key))

    def decoded(self, planned: PlannedDocument) -> DecodedDocument:
        document = self.encoded(planned.address)
        if (len(document.input_ids), document.tiles) != (planned.tokens, planned.tiles):
            raise PackingError(
                f"planned with {planned.tokens} tokens and {planned.tiles} tiles, "
                f"but it has {len(document.input_ids)} and {document.tiles}",
                where=f"source {document.source}, key {document.key}",
                remedy="the tokenizer, the layout or the shard changed since: undo that, or start a new run",
            )
        return self._encoder.decode(document, planned.address.source)

    def skip(self, address: SampleAddress, error: SampleError) -> Skip:
        source = self.sources[address.source]
        shard, key, offset = source.where(address.shard, address.sample)
        return Skip(source.name, shard, key, offset, str(error))
