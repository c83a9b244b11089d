"""Packing: which documents a lane lays into each of its sequences.

A lane plans alone, from addresses and lengths only; images are decoded after
their document was chosen.  All that it remembers is one int64 vector, so a lane
goes on from any sequence without reading again what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megablip.config import DataConfig
from megablip.data.order import Cursor, Mixture, SourceOrder
from megablip.errors import CheckpointError, SampleError
from megablip.records import PlannedDocument, PlannedSequence, SampleAddress

STATE_VERSION = 1
MAX_FAILURES_IN_A_ROW = 100

Measure = Callable[[SampleAddress], tuple[int, int]]
"""(tokens, tiles) of a sample; raises SampleError for a bad one."""

_HEADER = 7  # version, lane, index, skipped, too_long, number of sources, number of waiting documents
_PER_SOURCE = 4  # fingerprint, k, offset, consumed
_PER_DOCUMENT = 5  # source, shard, sample, tokens, tiles


@dataclass
class LaneState:
    """Where a lane stands after a sequence."""

    lane: int
    index: int  # of the next sequence
    skipped: int  # bad samples so far
    too_long: int  # documents dropped because no sequence can hold them
    sources: list[tuple[int, int, int, int]]  # fingerprint, k, offset, consumed units
    waiting: list[PlannedDocument]  # oldest first

    def to_vector(self) -> np.ndarray:
        """int64 vector that `from_vector` reads back."""
        header = [STATE_VERSION, self.lane, self.index, self.skipped, self.too_long]
        header += [len(self.sources), len(self.waiting)]
        numbers = [*header, *(number for source in self.sources for number in source)]
        for document in self.waiting:
            address = document.address
            numbers += [address.source, address.shard, address.sample, document.tokens, document.tiles]
        return np.array(numbers, np.int64)

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> LaneState:
        """
        Raises:
            CheckpointError: not a lane state of this version.
        """
        numbers = np.asarray(vector, np.int64).ravel().tolist()
        if numbers[:1] != [STATE_VERSION] or len(numbers) < _HEADER:
            raise CheckpointError(
                f"a lane state of version {numbers[:1]} can't be read",
                remedy=f"this megablip reads version {STATE_VERSION}: resume with the one that wrote the checkpoint",
            )
        _, lane, index, skipped, too_long, sources, waiting = numbers[:_HEADER]
        if len(numbers) != _HEADER + sources * _PER_SOURCE + waiting * _PER_DOCUMENT:
            raise CheckpointError(
                "a lane state has the wrong length", where=f"lane {lane}", remedy="use another checkpoint"
            )
        middle = _HEADER + sources * _PER_SOURCE
        return cls(
            lane, index, skipped, too_long,
            [tuple(row) for row in _rows(numbers[_HEADER:middle], _PER_SOURCE)],
            [
                PlannedDocument(SampleAddress(*address), tokens, tiles)
                for *address, tokens, tiles in _rows(numbers[middle:], _PER_DOCUMENT)
            ],
        )  # fmt: skip


def _rows(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]


def choose(waiting: Sequence[PlannedDocument], max_tokens: int, max_tiles: int) -> list[int]:
    """Indices of the waiting documents (oldest first) that go into the next sequence.

    The oldest goes first, so that nothing starves; then the largest that still
    fits both budgets, again and again (best fit decreasing into one open bin,
    the rest carried over).  As budgets only shrink, one pass by size does it.
    """
    by_size = sorted(range(1, len(waiting)), key=lambda index: -waiting[index].tokens)  # stable: ties by age
    chosen = []
    for index in [0, *by_size]:
        document = waiting[index]
        if document.tokens <= max_tokens and document.tiles <= max_tiles:
            chosen.append(index)
            max_tokens -= document.tokens
            max_tiles -= document.tiles
    return chosen


class LanePlanner:
    """Plans the sequences of one lane.

    Args:
        lane: its number.
        data: budgets, weights, buffer.
        seed: of the run.
        sources: order of each source of `data.sources`.
        measure: gives a sample's tokens and tiles.
        on_skip: told of each bad sample.
        state: vector to go on from; None starts at the beginning.

    Raises:
        CheckpointError: `state` is of another lane, other sources or changed shards.
    """

    def __init__(
        self,
        lane: int,
        data: DataConfig,
        seed: int,
        sources: Sequence[SourceOrder],
        measure: Measure,
        on_skip: Callable[[SampleAddress, SampleError], None] = lambda address, error: None,
        state: np.ndarray | None = None,
    ):
        self.lane, self._data, self._sources = lane, data, sources
        self._measure, self._on_skip = measure, on_skip
        if state is None:
            start = LaneState(lane, 0, 0, 0, [(source.fingerprint, 0, 0, 0) for source in sources], [])
        else:
            start = LaneState.from_vector(state)
            self._check(start)
        self.index, self.skipped, self.too_long = start.index, start.skipped, start.too_long
        self._waiting = start.waiting
        self._cursors = [
            Cursor(source, lane, k, offset) for source, (_, k, offset, _) in zip(sources, start.sources, strict=True)
        ]
        self._mixture = Mixture(
            [source.weight for source in data.sources],
            data.mixture_unit,
            data.sequence_length,
            lane,
            seed,
            [consumed for *_, consumed in start.sources],
        )

    def next_sequence(self) -> PlannedSequence:
        """Plan one more sequence.

        Raises:
            SampleError: too many samples in a row were of no use.
        """
        self._fill()
        chosen = set(choose(self._waiting, self._data.sequence_length, self._data.max_tiles))
        documents = tuple(document for index, document in enumerate(self._waiting) if index in chosen)
        self._waiting = [document for index, document in enumerate(self._waiting) if index not in chosen]
        self.index += 1
        return PlannedSequence(self.lane, self.index - 1, documents, self.state)

    @property
    def state(self) -> np.ndarray:
        """int64 vector; a planner made with it plans the same sequences from here on."""
        sources = [
            (source.fingerprint, cursor.k, cursor.offset, consumed)
            for source, cursor, consumed in zip(self._sources, self._cursors, self._mixture.consumed, strict=True)
        ]
        state = LaneState(self.lane, self.index, self.skipped, self.too_long, sources, self._waiting)
        return state.to_vector()

    def _fill(self) -> None:
        """Draw documents until the buffer is full."""
        failures: list[str] = []  # in a row
        while len(self._waiting) < self._data.packing_buffer:
            source = self._mixture.pick()
            address = SampleAddress(source, *self._cursors[source].next())
            try:
                tokens, tiles = self._measure(address)
            except SampleError as error:
                self.skipped += 1
                self._on_skip(address, error)
                failures.append(str(error))
            else:
                if tokens <= self._data.sequence_length and tiles <= self._data.max_tiles:
                    self._mixture.consume(source, tokens if self._data.mixture_unit == "tokens" else 1)
                    self._waiting.append(PlannedDocument(address, tokens, tiles))
                    failures.clear()
                    continue
                self.too_long += 1
                failures.append(f"{address}: too long, {tokens} tokens and {tiles} tiles")
            if len(failures) >= MAX_FAILURES_IN_A_ROW:
                raise SampleError(
                    f"{len(failures)} samples in a row can't be used; the last:\n" + "\n".join(failures[-5:]),
                    where=f"lane {self.lane}, source {self._data.sources[source].name}",
                    remedy="check the source's schema and shards, data.sequence_length and data.max_tiles",
                )

    def _check(self, state: LaneState) -> None:
        if state.lane != self.lane or len(state.sources) != len(self._sources):
            raise CheckpointError(
                f"the state is of lane {state.lane} with {len(state.sources)} sources",
                where=f"lane {self.lane} with {len(self._sources)} sources",
                remedy="resume with the recipe of the checkpoint",
            )
        for source, (fingerprint, *_) in zip(self._sources, state.sources, strict=True):
            if fingerprint != source.fingerprint:
                raise CheckpointError(
                    "the shards changed since the checkpoint: other shards, or other numbers of samples",
                    where=f"source {source.name}",
                    remedy="bring the shards back, or start a new run",
                )
