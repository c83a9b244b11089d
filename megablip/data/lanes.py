"""What a lane plans: which documents make up each of its sequences.

A lane plans alone, from addresses and lengths only; images are decoded after
their document was chosen.  All that it remembers is one int64 vector, so a lane
goes on from any sequence without reading again what waits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from struct import pack
from typing import Protocol

import numpy as np

from megablip.config import DataConfig, SourceConfig, weights_at
from megablip.data.order import Cursor, Mixture, ShardOrder, SourceOrder, keyed_number
from megablip.data.pack import COLUMNS, PackingBuffer
from megablip.data.split import cut
from megablip.errors import CheckpointError, SampleError
from megablip.records import PlannedDocument, PlannedSequence, SampleAddress

STATE_VERSION = 2
MAX_FAILURES_IN_A_ROW = 100

# A state is the header, a row for each source of the recipe, a row for each document of the packing buffer.
_HEADER = ("version", "lane", "index", "is_dry", "skipped", "dropped", "cut", "added", "sources", "rows")
_PER_SOURCE = ("name", "fingerprint", "weights", "k", "offset", "drawn", "consumed")


class Measure(Protocol):
    """Tells what samples cost. Both raise SampleError for a bad one."""

    def __call__(self, address: SampleAddress) -> tuple[int, int]:
        """(tokens, tiles) of a sample."""

    def segments(self, address: SampleAddress) -> list[tuple[int, int]]:
        """(tokens, tiles) of each segment of a sample; asked only where it is to be cut."""


class LaneState:
    """Where a lane stands after a sequence: a view of its int64 vector, cheap to make.

    Attributes:
        lane: number of the lane.
        index: of the next sequence.
        is_dry: all epochs of the stage are over, and nothing waits.
        skipped: bad samples so far.
        dropped: samples that no sequence can hold.
        cut: samples that were cut into pieces.
    """

    def __init__(self, vector: np.ndarray):
        """
        Raises:
            CheckpointError: not a lane state of this version.
        """
        self.vector = np.asarray(vector, np.int64).ravel()
        if self.vector[:1].tolist() != [STATE_VERSION] or len(self.vector) < len(_HEADER):
            raise CheckpointError(
                f"a lane state of version {self.vector[:1].tolist()} can't be read",
                remedy=f"this megablip reads version {STATE_VERSION}: resume with the one that wrote the checkpoint",
            )
        _, self.lane, self.index, is_dry, self.skipped, self.dropped, self.cut, self.added, sources, rows = self.vector[
            : len(_HEADER)
        ].tolist()
        self.is_dry = bool(is_dry)
        middle = len(_HEADER) + sources * len(_PER_SOURCE)
        if min(sources, rows) < 0 or len(self.vector) != middle + rows * len(COLUMNS):
            raise CheckpointError(
                "a lane state has the wrong length", where=f"lane {self.lane}", remedy="use another checkpoint"
            )
        self.sources = self.vector[len(_HEADER) : middle].reshape(sources, len(_PER_SOURCE))
        self.rows = self.vector[middle:].reshape(rows, len(COLUMNS))
        if not ((self.rows[:, 0] >= 0) & (self.rows[:, 0] < max(sources, 1))).all():
            raise CheckpointError(
                "a document waits in a lane state whose source the state lacks",
                where=f"lane {self.lane}",
                remedy="use another checkpoint",
            )

    @property
    def drawn(self) -> np.ndarray:
        """int64[sources], samples drawn so far, bad ones included, by the recipe's order of sources."""
        return self.sources[:, _PER_SOURCE.index("drawn")]

    @property
    def done(self) -> np.ndarray:
        """int64[sources], samples drawn that do not wait: packed, skipped or dropped."""
        # The last piece of a sample leaves last, and a sample that was not cut is one last piece.
        source, last = self.rows[:, COLUMNS.index("source")], self.rows[:, COLUMNS.index("last")]
        return self.drawn - np.bincount(source[last == 1], minlength=len(self.sources))

    @property
    def samples_done(self) -> int:
        return int(self.done.sum())

    @property
    def waiting(self) -> list[PlannedDocument]:
        """What waits to be packed, oldest first."""
        by_age = sorted(self.rows.tolist(), key=lambda row: row[-1])
        return [
            PlannedDocument(SampleAddress(source, shard, sample), tokens, tiles, start, bool(last))
            for source, shard, sample, tokens, tiles, start, last, _ in by_age
            if tokens
        ]


class LanePlanner:
    """Plans the sequences of one lane.

    Args:
        lane: its number.
        data: budgets, weights, buffer.
        seed: of the run.
        sequences_per_lane: of a step; weights may depend on the step.
        sources: order of each source of `data.sources`.
        measure: gives a sample's costs; `segments` is needed only for sources with `split: text`.
        on_skip: told of each bad sample.
        state: vector to go on from; None starts at the beginning.
        epochs: the stage ends after so many of each source, and sequences are then without documents; None: never.
        allow_source_changes: sources may have been added, removed, weighed anew, or have other shards.

    Attributes:
        source_changes: what is different from the state, a line each; the same for all lanes.

    Raises:
        CheckpointError: `state` is of another lane, or of sources that differ without leave.
    """

    def __init__(
        self,
        lane: int,
        data: DataConfig,
        seed: int,
        sequences_per_lane: int,
        sources: Sequence[SourceOrder | ShardOrder],
        measure: Measure,
        on_skip: Callable[[SampleAddress, SampleError], None] = lambda address, error: None,
        state: np.ndarray | None = None,
        *,
        epochs: int | None = None,
        allow_source_changes: bool = False,
    ):
        self.lane, self._data, self._sequences_per_lane = lane, data, sequences_per_lane
        self._measure, self._on_skip = measure, on_skip
        self._schedules = [source.weight_schedule for source in data.sources]
        self._piece_starts = sorted({step for schedule in self._schedules for step, _ in schedule})
        names = [source.name for source in data.sources]
        self._keys = [_keys(source, order) for source, order in zip(data.sources, sources, strict=True)]
        self._mixture = Mixture(names, data.mixture_unit, data.sequence_length, lane, seed)
        places: list[Sequence[int]] = [(0, 0, 0, 0)] * len(sources)  # k, offset, drawn, consumed
        rows, consumed = None, None
        self.index = self.skipped = self.dropped = self.cut = added = 0
        self.source_changes: tuple[str, ...] = ()
        if state is not None:
            start = LaneState(state)
            self._check_lane(start)
            self.index, self.skipped, self.dropped, self.cut = start.index, start.skipped, start.dropped, start.cut
            added = start.added
            places, rows, self.source_changes = _carried_over(start, names, self._keys)
            if self.source_changes and not allow_source_changes:
                raise CheckpointError(
                    "the sources are not those of the checkpoint: " + "; ".join(self.source_changes),
                    where=f"lane {lane}",
                    remedy="undo the change, or allow it with `allow_changes: [data.sources]`",
                )
            if not self.source_changes:
                consumed = [place[-1] for place in places]
        self._buffer = PackingBuffer(data.sequence_length, data.max_tiles, data.packing_buffer, rows, added)
        self._drawn = [drawn for _, _, drawn, _ in places]
        self._cursors = [
            Cursor(order, lane, k, offset, epochs) for order, (k, offset, *_) in zip(sources, places, strict=True)
        ]
        self._piece = self._piece_of(max(0, self.index - 1))  # of the sequence before: `consumed` was counted there
        self._begin_piece(self._piece, consumed)
        for source, cursor in enumerate(self._cursors):
            if cursor.ended:
                self._mixture.drop(source)

    def next_sequence(self) -> PlannedSequence:
        """Plan one more sequence.

        Raises:
            SampleError: too many samples in a row were of no use.
            ShardError: a shard can't be read.
        """
        piece = self._piece_of(self.index)
        if piece != self._piece:
            self._begin_piece(piece, None)
        self._fill()
        documents = self._buffer.take()
        self.index += 1
        return PlannedSequence(self.lane, self.index - 1, documents, self.state)

    @property
    def state(self) -> np.ndarray:
        """int64 vector; a planner made with it plans the same sequences from here on."""
        buffer = self._buffer
        rows = buffer.rows()
        is_dry = not len(buffer) and self._mixture.pick() is None
        numbers = [STATE_VERSION, self.lane, self.index, is_dry, self.skipped, self.dropped, self.cut, buffer.added]
        numbers += [len(self._keys), len(rows) // (8 * len(COLUMNS))]
        for keys, cursor, drawn, consumed in zip(
            self._keys, self._cursors, self._drawn, self._mixture.consumed, strict=True
        ):
            numbers += [*keys, cursor.k, cursor.offset, drawn, consumed]
        return np.frombuffer(pack(f"={len(numbers)}q", *numbers) + rows, np.int64)

    def _piece_of(self, index: int) -> int:
        """Which piece of the weights' schedules holds at a sequence."""
        return bisect_right(self._piece_starts, index // self._sequences_per_lane) - 1

    def _begin_piece(self, piece: int, consumed: list[int] | None) -> None:
        self._piece = piece
        self._mixture.begin(weights_at(self._schedules, self._piece_starts[piece]), consumed)

    def _fill(self) -> None:
        """Draw documents until the buffer is full, or the epochs are over."""
        buffer, mixture, data = self._buffer, self._mixture, self._data
        max_tokens, max_tiles, by_tokens = data.sequence_length, data.max_tiles, data.mixture_unit == "tokens"
        failures: list[str] = []  # in a row
        while len(buffer) < data.packing_buffer and (source := mixture.pick()) is not None:
            cursor = self._cursors[source]
            address = SampleAddress(source, *cursor.next())
            self._drawn[source] += 1
            if cursor.ended:
                mixture.drop(source)
            try:
                tokens, tiles = self._measure(address)
                if tokens <= max_tokens and tiles <= max_tiles:
                    documents = [PlannedDocument(address, tokens, tiles)]
                else:
                    documents = self._cut(address)
            except SampleError as error:
                self.skipped += 1
                self._on_skip(address, error)
                failures.append(str(error))
            else:
                if documents:
                    mixture.consume(source, tokens if by_tokens else 1)
                    for document in documents:
                        buffer.add(document)
                    failures.clear()
                    continue
                self.dropped += 1
                failures.append(f"{address}: too long, {tokens} tokens and {tiles} tiles")
            if len(failures) >= MAX_FAILURES_IN_A_ROW:
                raise SampleError(
                    f"{len(failures)} samples in a row can't be used; the last:\n" + "\n".join(failures[-5:]),
                    where=f"lane {self.lane}, source {data.sources[source].name}",
                    remedy="see the run's quarantine.jsonl; check the source's schema and shards, data.sequence_length "
                    "and data.max_tiles, then move that file away",
                )

    def _cut(self, address: SampleAddress) -> list[PlannedDocument]:
        """Pieces of a document that is too long; none if it is to be dropped."""
        if self._data.sources[address.source].split == "never":
            return []
        pieces = cut(self._measure.segments(address), self._data.sequence_length, self._data.max_tiles)
        self.cut += bool(pieces)
        return [
            PlannedDocument(address, piece.tokens, piece.tiles, piece.start, last=piece is pieces[-1])
            for piece in pieces
        ]

    def _check_lane(self, state: LaneState) -> None:
        if state.lane != self.lane:
            raise CheckpointError(
                f"the state is of lane {state.lane}", where=f"lane {self.lane}", remedy="use another checkpoint"
            )


def _keys(source: SourceConfig, order: SourceOrder | ShardOrder) -> tuple[int, int, int]:
    """Name, shards and weights of a source, each as 63 bits."""
    return (
        keyed_number("source", source.name) >> 1,
        order.fingerprint,
        keyed_number("weights", source.weight_schedule) >> 1,
    )


def _carried_over(
    state: LaneState, names: list[str], keys: list[tuple[int, int, int]]
) -> tuple[list[Sequence[int]], np.ndarray, tuple[str, ...]]:
    """What of a state is of use to the recipe's sources.

    Returns:
        (k, offset, drawn, consumed) of each source; the rows of documents that
        still wait, with their new source numbers; what has changed, a line each.
    """
    before = {row[0]: (number, row[1:]) for number, row in enumerate(state.sources.tolist())}
    places: list[Sequence[int]] = []
    new_number = np.full(len(state.sources), -1)
    changes = []
    for number, (name, (key, fingerprint, weights)) in enumerate(zip(names, keys, strict=True)):
        old_number, (old_fingerprint, old_weights, *place) = before.pop(key, (-1, (fingerprint, weights, 0, 0, 0, 0)))
        if old_number < 0:
            changes.append(f"source {name} is new")
        elif old_fingerprint != fingerprint:
            changes.append(f"source {name} has other shards, samples or lanes: it starts from its beginning")
            place = [0, 0, 0, 0]
        else:
            new_number[old_number] = number
            if old_weights != weights:
                changes.append(f"source {name} has another weight")
        places.append(place)
    for old_number, _ in before.values():
        changes.append(f"source {old_number} of the checkpoint's list, counted from 0, is no longer in the recipe")
    rows = state.rows.copy()
    waits = rows[:, COLUMNS.index("tokens")] > 0
    rows[waits, 0] = new_number[rows[waits, 0]]
    return places, rows[rows[:, 0] >= 0] if changes else rows, tuple(changes)
