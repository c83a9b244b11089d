"""The helper processes of a rank: one planner, and workers that decode.

    planner --(which documents)--> decode workers --(packed sequences)--> rank

Sequence j of a rank is decoded by worker j mod workers.  They are plain
subprocesses rather than `multiprocessing` ones: those import the parent's main
module, which is the trainer with DeepSpeed (seconds, and hundreds of MB, for
each of them), and forking a rank, which has threads, is unsafe.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

from megablip.config import DataConfig
from megablip.data.handover import TileSlots
from megablip.data.images import empty_tiles
from megablip.data.samples import SampleReader, Setup, decode, plan
from megablip.errors import MegablipError
from megablip.records import PackedSequence

POLL_S = 1.0  # how often a rank looks whether its helpers live
CRASH_REPORT_BYTES = 1 << 16
PIPE_BYTES = 1 << 20  # the most that Linux gives without privileges
AHEAD_SEQUENCES = 4  # of a decode worker: two keep it busy, the others even out that sequences take unequal time
_ENVIRONMENT = {
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")},
    # Pixels come and go: memory that is given back to the system costs a page fault for each 4 kB the next time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # meant for the ranks, which decide what to do


class Pipeline(Protocol):
    """Where a loader gets its sequences from."""

    def totals(self) -> dict[str, int]:
        """Samples of each source that is counted, by name; to be asked first."""

    def take(self) -> PackedSequence:
        """The next sequence.

        While its tiles are held, so is a part of a worker's memory: what is to be kept is copied, unless `may_keep`.
        """

    def may_keep(self) -> bool:
        """Whether the tiles taken so far may be held for as long as anybody likes: no worker will wait for them."""

    def check(self) -> None:
        """
        Raises:
            MegablipError: what gives the sequences has ended; with its traceback, if it left one.
        """

    def stop(self) -> None:
        """End at once; a `take` in another thread fails."""

    def close(self) -> None:
        """Let go of everything, once nobody takes any more."""


class InlinePipeline:
    """Plans and decodes in the thread that asks: no process, for debugging and small data."""

    def __init__(self, setup: Setup):
        self._setup = setup

    def totals(self) -> dict[str, int]:
        self._reader = SampleReader(self._setup)
        self._planned = plan(self._setup, self._reader)
        return _totals(self._reader, self._setup.data)

    def take(self) -> PackedSequence:
        planned, skipped = next(self._planned)
        tiles = sum(document.tiles for document in planned.documents)
        out = empty_tiles(tiles, self._setup.layout.tile_size)
        return decode(self._reader, self._setup.layout, planned, skipped, out)

    def may_keep(self) -> bool:
        return True

    def check(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class ProcessPipeline:
    """A planner process and decode workers.

    Args:
        setup: what they are to do.
        workers: number of decode processes.
        held: sequences that the rank takes before it copies their tiles.
        kept: further sequences whose tiles are kept, and not copied.
        rank: for messages.
    """

    def __init__(self, setup: Setup, workers: int, held: int, kept: int, rank: int):
        task_pipes = [_pipe() for _ in range(workers)]
        # Beyond what the rank may hold of a worker, so that no worker waits for the one whose turn it is.
        self._kept = -(-kept // workers)
        slots = self._kept + -(-held // workers) + AHEAD_SEQUENCES
        all_slots = [TileSlots.create(slots, setup.data.max_tiles, setup.layout.tile_size) for _ in range(workers)]
        self._planner = _start("planner", f"planner of rank {rank}", setup, [write.fileno() for _, write in task_pipes])
        setup = replace(setup, lane_states={})  # the planner's alone, and large
        self._workers = [
            _start("worker", f"decode worker {number} of rank {rank}", setup, [read.fileno()], slots)
            for number, ((read, _), slots) in enumerate(zip(task_pipes, all_slots, strict=True))
        ]
        self.helpers = [self._planner, *self._workers]
        for connection in itertools.chain(*task_pipes):
            connection.close()  # the helpers have their own; an end is seen only when no one else holds it
        self._turns = itertools.cycle(self._workers)

    def totals(self) -> dict[str, int]:
        return self._receive(self._planner)

    def take(self) -> PackedSequence:
        worker = next(self._turns)
        sequence, slot, tiles = self._receive(worker)
        return replace(sequence, tiles=worker.slots.lend(slot, tiles))

    def may_keep(self) -> bool:
        return all(worker.slots.lent <= self._kept for worker in self._workers)

    def stop(self) -> None:
        for helper in self.helpers:  # they hold nothing worth saving
            helper.process.kill()

    def close(self) -> None:
        for helper in self.helpers:
            helper.close()

    def check(self) -> None:
        if any(helper.process.poll() is not None for helper in self.helpers):
            raise self._cause()

    def _receive(self, helper: Helper) -> Any:
        """The helper's next message."""
        while not helper.poller.poll(POLL_S * 1000):
            self.check()
        try:
            message = helper.output.recv()
        except (EOFError, OSError):
            raise self._cause() from None
        if isinstance(message, Failure):
            raise message.error
        return message

    def _cause(self) -> Exception:
        """Why helpers ended: the first failure that one reported, else the first that was killed.

        One that ends takes the others with it, as their pipes break; those end quietly.
        """
        deadline = time.monotonic() + POLL_S
        while time.monotonic() < deadline and any(helper.process.poll() is None for helper in self.helpers):
            time.sleep(0.02)
        ended = [helper for helper in self.helpers if helper.process.poll() is not None]
        for helper in ended:
            if failure := helper.last_words():
                return failure.error
        for helper in sorted(ended, key=lambda helper: helper.process.returncode == 0):
            code = helper.process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            report = helper.crash_report()
            return MegablipError(
                f"the {helper.name} {how}" + (f":\n{report}" if report else ""),
                where=f"process {helper.process.pid}",
                remedy="if memory ran out (see dmesg), lower data.decode_workers or data.prefetch_bytes; "
                "else see its last lines on stderr",
            )
        return MegablipError("a pipe to the loader's helpers broke", remedy="start again")


@dataclass(frozen=True)
class Failure:
    """What ends the sequences: the last message of a helper, or in the place of a planned sequence."""

    error: MegablipError


@dataclass
class Helper:
    name: str
    process: subprocess.Popen
    lifeline: Connection  # the helper ends when this is closed, as it is when the rank dies
    output: Connection
    poller: select.poll  # of the output; Connection.poll would make one for each message
    crash_file: int  # where faulthandler writes the Python stacks when the process crashes in C
    slots: TileSlots | None

    def last_words(self) -> Failure | None:
        try:
            while self.output.poll():
                message = self.output.recv()
                if isinstance(message, Failure):
                    return message
        except (EOFError, OSError):
            pass
        return None

    def crash_report(self) -> str:
        return os.pread(self.crash_file, CRASH_REPORT_BYTES, 0).decode(errors="replace").strip()

    def close(self) -> None:
        self.process.wait()
        self.lifeline.close()
        self.output.close()
        os.close(self.crash_file)
        if self.slots:
            self.slots.close()


def _start(role: str, name: str, setup: Setup, given: list[int], slots: TileSlots | None = None) -> Helper:
    """Start a helper; it is `given` file descriptors beside its lifeline, its output, its crash file and its slots."""
    lifeline_end, lifeline = Pipe(duplex=False)
    output, output_end = _pipe()
    crash_file = os.memfd_create("megablip-crash")
    descriptors = [lifeline_end.fileno(), output_end.fileno(), crash_file, *given]
    descriptors += slots.descriptors if slots else ()
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the helper inherits it: no moment is left open
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", "from megablip.data.workers import helper_main; helper_main()", role]
            + [str(descriptor) for descriptor in descriptors],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    lifeline_end.close()
    output_end.close()
    with suppress(BrokenPipeError):  # it ended at once; the rank will notice as it waits for output
        lifeline.send((name, setup, slots.slots if slots else 0))
    poller = select.poll()
    poller.register(output.fileno(), select.POLLIN)
    return Helper(name, process, lifeline, output, poller, crash_file, slots)


def _pipe() -> tuple[Connection, Connection]:
    """(read, write) ends of a pipe that holds several sequences: with the usual 64 kB a helper waits to send one."""
    read, write = Pipe(duplex=False)
    with suppress(OSError):  # over the user's limit of pipe memory
        fcntl.fcntl(write.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


def helper_main() -> None:
    """Entry of a helper process; the command line is its role and its file descriptors."""
    role = sys.argv[1]
    lifeline_fd, output_fd, crash_file, *given = map(int, sys.argv[2:])
    faulthandler.enable(file=crash_file)
    lifeline = Connection(lifeline_fd, writable=False)
    output = Connection(output_fd, readable=False)
    name, setup, count = lifeline.recv()
    threading.Thread(target=_end_with_rank, args=(lifeline,), daemon=True).start()
    try:
        if role == "planner":
            _plan(setup, output, [Connection(descriptor, readable=False) for descriptor in given])
        else:
            read, *memory = given
            slots = TileSlots(tuple(memory), count, setup.layout.tile_size)
            _work(setup, Connection(read, writable=False), output, slots)
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
    """Planner: the totals to the rank, then sequences to the workers in turn.

    What ends the plan comes in turn, too, so the rank has all sequences before it.
    """
    reader = SampleReader(setup)
    output.send(_totals(reader, setup.data))
    gc.freeze()  # what is there now stays: collections need not look at it
    turns = itertools.cycle(tasks)
    try:
        for task in plan(setup, reader):
            next(turns).send(task)
    except MegablipError as error:
        next(turns).send(Failure(error))
        threading.Event().wait()  # for the rank to end this process: it would take an end for the failure


def _work(setup: Setup, tasks: Connection, output: Connection, slots: TileSlots) -> None:
    """Decode worker: planned sequences to packed ones; their tiles lie in a slot."""
    reader = SampleReader(setup)
    nothing = empty_tiles(0, setup.layout.tile_size)
    gc.freeze()
    while True:
        task = tasks.recv()
        if isinstance(task, Failure):
            output.send(task)
            continue
        planned, skipped = task
        slot, out = slots.take(sum(document.tiles for document in planned.documents))
        sequence = decode(reader, setup.layout, planned, skipped, out)
        output.send((replace(sequence, tiles=nothing), slot, len(sequence.tiles)))


def _totals(reader: SampleReader, data: DataConfig) -> dict[str, int]:
    """Samples of each source that is counted: not of those shuffled by shards, which would all have to be fetched."""
    return {
        source.name: source.total
        for config, source in zip(data.sources, reader.sources, strict=True)
        if config.order == "samples"
    }
