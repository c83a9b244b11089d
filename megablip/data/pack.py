"""Packing: which of the documents that wait go into the next sequence.

A buffer of documents is carried from sequence to sequence.  A sequence begins
with the oldest documents, in order, which leaves the buffer with lengths as the
data has them, and ends with the one or two that fill it best: a buffer of 256
knows some 30,000 pairs, so hardly a token stays empty.

Tiles cost the vision tower as tokens cost the decoder, and all ranks wait for
the one that has most.  So the last documents are also chosen to bring a
sequence's tiles near those that the waiting documents have per token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import islice
from struct import Struct

import numpy as np

from megablip.errors import PackingError
from megablip.records import PlannedDocument, SampleAddress

COLUMNS = ("source", "shard", "sample", "tokens", "tiles", "start", "last", "serial")
_ROW = Struct(f"={len(COLUMNS)}q")
_FREE = bytes(_ROW.size)  # a document has a token at least, so a row without one is free

# Measured on traces of captions, interleaved pages and instructions: more of either gains nothing.
_FIRSTS = 12  # oldest documents that are tried as the first of a pair
_SECONDS = 2  # documents tried as the second: the longest that fit
# What may stay empty, and what a tile off the target is worth, in parts of a sequence.
_GRAIN = 256


class PackingBuffer:
    """The documents that wait, and the choice among them.

    A document waits in a row of int64 numbers, so a snapshot is one copy.
    Every sequence takes the oldest: none waits for more sequences than there
    were documents ahead of it.

    Args:
        max_tokens, max_tiles: of a sequence.
        documents: rows that are kept even when free, so that a snapshot's size is steady.
        rows: int64[n, 8], those of a snapshot.
        added: documents ever added before it.

    Raises:
        PackingError: a document of `rows` fits no sequence.
    """

    def __init__(self, max_tokens: int, max_tiles: int, documents: int, rows: np.ndarray | None = None, added: int = 0):
        self.max_tokens, self.max_tiles = max_tokens, max_tiles
        self.added = added
        self._kept_rows = documents
        self._grain = max(1, max_tokens // _GRAIN)
        self._rows = bytearray(b"" if rows is None else np.ascontiguousarray(rows, np.int64).tobytes())
        count = len(self._rows) // _ROW.size
        self._documents: list[PlannedDocument | None] = [None] * count  # of each row, as are these:
        self._tokens, self._tiles, self._serials = [0] * count, [0] * count, [0] * count
        self._total_tokens = self._total_tiles = 0
        self._waiting: dict[int, int] = {}  # serial -> row, oldest first
        self._blocked: set[int] = set()  # rows of pieces whose piece before still waits
        # The others by length, of equal ones the newest first; two lists, as both hold small integers.
        self._sizes: list[int] = []
        self._by_size: list[int] = []
        self._free: list[int] = []  # the lowest last
        numbers = [_ROW.unpack_from(self._rows, row * _ROW.size) for row in range(count)]
        for row in sorted(range(count), key=lambda row: numbers[row][-1]):
            *address, tokens, tiles, start, last, serial = numbers[row]
            if tokens:
                self._enter(row, serial, PlannedDocument(SampleAddress(*address), tokens, tiles, start, bool(last)))
            else:
                self._free.append(row)
        self._free.sort(reverse=True)

    def __len__(self) -> int:
        return len(self._waiting)

    def rows(self) -> bytes:
        """Snapshot: int64[n, 8], columns as in COLUMNS; rows without tokens are free."""
        return bytes(self._rows)

    def add(self, document: PlannedDocument) -> None:
        """Let a document wait, or a piece of one; pieces come in order, one right after another.

        Raises:
            PackingError: no sequence can hold it.
        """
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._documents)
            self._rows += _FREE
            for column in (self._documents, self._tokens, self._tiles, self._serials):
                column.append(0)
        self._enter(row, self.added, document)
        address = document.address
        _ROW.pack_into(
            self._rows, row * _ROW.size,
            address.source, address.shard, address.sample,
            document.tokens, document.tiles, document.start, document.last, self.added,
        )  # fmt: skip
        self.added += 1

    def take(self) -> tuple[PlannedDocument, ...]:
        """The documents of the next sequence, oldest first; none if none waits."""
        if not self._waiting:
            return ()
        chosen = self._choose()
        chosen.sort(key=self._serials.__getitem__)
        documents = tuple(map(self._documents.__getitem__, chosen))
        for row, document in zip(chosen, documents, strict=True):
            self._rows[row * _ROW.size : (row + 1) * _ROW.size] = _FREE
            self._documents[row] = None
            self._total_tokens -= document.tokens
            self._total_tiles -= document.tiles
            if not document.last:  # the next piece may follow, in a later sequence
                following = self._waiting[self._serials[row] + 1]
                self._blocked.remove(following)
                self._insert(following)
        self._release(chosen)
        return documents

    def _choose(self) -> list[int]:
        """Rows of the next sequence, no longer among those that wait."""
        tokens_of, tiles_of, blocked = self._tokens, self._tiles, self._blocked
        room, room_tiles = self.max_tokens, self.max_tiles
        target = (self._total_tiles * room + self._total_tokens // 2) // self._total_tokens
        target = min(target, room_tiles)
        pair = 2 * self._total_tokens // len(self._waiting)  # tokens of two documents: room to choose the last ones
        chosen: list[int] = []
        for row in self._waiting.values():
            if row in blocked:
                continue
            if chosen and (room - tokens_of[row] < pair or tiles_of[row] > room_tiles):
                break
            chosen.append(row)
            room -= tokens_of[row]
            room_tiles -= tiles_of[row]
            target -= tiles_of[row]
            if room < pair:
                break
        for row in chosen:
            self._remove(row)
        while found := self._best(room, room_tiles, target):
            for row in found:
                chosen.append(row)
                room -= tokens_of[row]
                room_tiles -= tiles_of[row]
                target -= tiles_of[row]
                self._remove(row)
        return chosen

    def _best(self, room: int, room_tiles: int, target: int) -> tuple[int, ...]:
        """The document, or pair of documents, that leaves least empty and brings most to the target of tiles."""
        tokens_of, tiles_of, sizes, by_size, grain = self._tokens, self._tiles, self._sizes, self._by_size, self._grain
        fitting = bisect_right(sizes, room)
        if not fitting:
            return ()
        best: tuple[int, ...] = ()
        least = 1 << 62  # tokens left empty, and tiles off the target at `grain` tokens each
        most_over = target - room_tiles  # tiles off the target where the limit is reached; negative, as all above it
        for place in range(fitting - 1, max(fitting - 1 - _SECONDS, -1), -1):
            row = by_size[place]
            off = target - tiles_of[row]
            cost = room - sizes[place] + grain * abs(off)
            if cost < least and off >= most_over:
                least, best = cost, (row,)
        for first in islice(self._waiting.values(), _FIRSTS):
            if least <= grain:
                break
            left = room - tokens_of[first]
            fitting_second = bisect_right(sizes, left)
            if not fitting_second or first in self._blocked:
                continue
            first_off = target - tiles_of[first]
            for place in (fitting_second - 1, fitting_second - 2) if fitting_second > 1 else (0,):
                row = by_size[place]
                off = first_off - tiles_of[row]
                cost = left - sizes[place] + grain * abs(off)
                if cost < least and off >= most_over and row != first:
                    least, best = cost, (first, row)
        if not best:  # tiles run out before tokens do: the longest with few enough
            best = tuple(islice((row for row in reversed(by_size[:fitting]) if tiles_of[row] <= room_tiles), 1))
        return best

    def _enter(self, row: int, serial: int, document: PlannedDocument) -> None:
        tokens, tiles = document.tokens, document.tiles
        if not 0 < tokens <= self.max_tokens or not 0 <= tiles <= self.max_tiles:
            raise PackingError(
                f"a document of {tokens} tokens and {tiles} tiles fits no sequence",
                where=f"{document.address}; a sequence has {self.max_tokens} tokens and {self.max_tiles} tiles",
                remedy="this is a fault of megablip or a damaged checkpoint: report it",
            )
        self._documents[row] = document
        self._tokens[row], self._tiles[row], self._serials[row] = tokens, tiles, serial
        self._total_tokens += tokens
        self._total_tiles += tiles
        if document.start and serial - 1 in self._waiting:
            self._blocked.add(row)
        else:
            self._insert(row)
        self._waiting[serial] = row

    def _insert(self, row: int) -> None:
        sizes, by_size, serials, tokens = self._sizes, self._by_size, self._serials, self._tokens[row]
        place = bisect_left(sizes, tokens)
        while place < len(sizes) and sizes[place] == tokens and serials[by_size[place]] > serials[row]:
            place += 1
        sizes.insert(place, tokens)
        by_size.insert(place, row)

    def _remove(self, row: int) -> None:
        place = self._by_size.index(row, bisect_left(self._sizes, self._tokens[row]))
        del self._sizes[place], self._by_size[place], self._waiting[self._serials[row]]

    def _release(self, rows: list[int]) -> None:
        free = self._free = sorted(self._free + rows, reverse=True)
        while len(self._documents) > self._kept_rows and free[:1] == [len(self._documents) - 1]:
            row = free.pop(0)
            del self._documents[row], self._tokens[row], self._tiles[row], self._serials[row]
            del self._rows[row * _ROW.size :]
