"""The helper processes of a rank: one planner, and workers that decode.

They are plain subprocesses rather than `multiprocessing` ones: those import the
parent's main module, which is the trainer with torch and DeepSpeed (2 s and
200 MB for each of them), and forking a rank, which has threads, is unsafe.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from megablip.config import DataConfig
from megablip.data.encode import Encoder
from megablip.data.order import SourceOrder
from megablip.data.pack import LanePlanner
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource
from megablip.errors import MegablipError, PackingError, SampleError
from megablip.records import (
    DecodedDocument,
    EncodedDocument,
    PackedSequence,
    PlannedDocument,
    SampleAddress,
    Skip,
    VisualLayout,
)

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # meant for the ranks, which decide what to do


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
class Failure:
    """Last message of a helper."""

    error: MegablipError


@dataclass
class Helper:
    name: str
    process: subprocess.Popen
    lifeline: Connection  # the helper ends when this is closed, as it is when the rank dies
    output: Connection

    def last_words(self) -> Failure | None:
        try:
            while self.output.poll():
                message = self.output.recv()
                if isinstance(message, Failure):
                    return message
        except (EOFError, OSError):
            pass
        return None


def start_helper(role: str, name: str, setup: Setup, connections: list[Connection]) -> Helper:
    """Start a helper that has `connections` beside its lifeline and its output."""
    lifeline_end, lifeline = Pipe(duplex=False)
    output, output_end = Pipe(duplex=False)
    descriptors = [connection.fileno() for connection in (lifeline_end, output_end, *connections)]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the helper inherits it: no moment is left open
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", "from megablip.data.workers import helper_main; helper_main()", role]
            + [str(descriptor) for descriptor in descriptors],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    lifeline_end.close()
    output_end.close()
    with suppress(BrokenPipeError):  # it ended at once; the rank will notice as it waits for output
        lifeline.send((name, setup))
    return Helper(name, process, lifeline, output)


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
        output.send(Failure(with_traceback(error, name)))
        sys.exit(1)


def with_traceback(error: BaseException, name: str) -> MegablipError:
    """The error itself if it was raised on purpose, else one that holds its traceback."""
    if isinstance(error, MegablipError):
        return error
    text = "".join(traceback.format_exception(error))
    return MegablipError(f"the {name} failed:\n{text}", remedy="this is a fault of megablip: report it")


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
