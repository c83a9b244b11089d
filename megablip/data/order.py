"""The order of data: pure functions of (seed, source, lane, position).

A lane is a logical data-parallel rank.  A source is cut into blocks of
consecutive samples; lane l's k-th block is number k * lanes + l of an endless
sequence of epochs, each a keyed permutation of the blocks.  So the lanes
together see every sample once an epoch, no lane needs to know another, and any
position is reached in O(1) time and memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

MAX_BLOCK_SAMPLES = 64  # long enough for sequential reads
BLOCKS_PER_LANE = 100  # at least so many an epoch, so that a small source is covered evenly at every moment
PHASE_STEPS = 1024  # resolution of a lane's phase, in parts of a unit

_ROUNDS = 8
_MASK = 2**64 - 1


def keyed_number(*key: object) -> int:
    """A 64-bit number that depends on `key` alone: the same on every machine and in every process."""
    text = "\x1f".join(map(str, key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class Permutation:
    """A keyed pseudo-random permutation of range(n) in O(1) memory.

    A Feistel network on the smallest number of bits that holds n, walked on
    until it lands inside the range (cycle walking: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", CT-RSA 2002); that takes two rounds at most on average.
    """

    __slots__ = ("_keys", "_low_bits", "_masks", "n")

    def __init__(self, n: int, *key: object):
        bits = max(2, (n - 1).bit_length())
        self.n = n
        self._low_bits = bits // 2
        self._masks = ((1 << bits - bits // 2) - 1, (1 << bits // 2) - 1)
        self._keys = [keyed_number("permutation", *key, number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        high_mask, low_mask = self._masks
        while True:
            high, low = position >> self._low_bits, position & low_mask
            for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
                high ^= _mix(low ^ even) & high_mask
                low ^= _mix(high ^ odd) & low_mask
            position = high << self._low_bits | low
            if position < self.n:
                return position


def block_size(total: int, lanes: int) -> int:
    """Samples of a block of a source with `total` samples."""
    return min(max(total // (BLOCKS_PER_LANE * lanes), 1), MAX_BLOCK_SAMPLES)


class Block(NamedTuple):
    """`length` consecutive samples of a shard."""

    shard: int
    start: int
    length: int


class SourceOrder:
    """The order of one source for all lanes.

    Args:
        name: part of the key, so that sources differ.
        counts: int64[shards], samples of each shard.
        lanes: number of lanes of the stage.
        seed: of the run.
    """

    def __init__(self, name: str, counts: np.ndarray, lanes: int, seed: int):
        self.name, self.lanes, self.seed = name, lanes, seed
        self.counts = np.asarray(counts, np.int64)
        self.block_size = block_size(int(self.counts.sum()), lanes)
        self._shard_ends = np.cumsum(-(-self.counts // self.block_size))  # in blocks; none straddles shards
        self.blocks = int(self._shard_ends[-1])
        self._epoch = lru_cache(maxsize=4)(lambda epoch: Permutation(self.blocks, seed, name, epoch))

    @property
    def fingerprint(self) -> int:
        """63 bits that change when a shard is added, removed, or changes its number of samples."""
        return keyed_number(self.name, self.lanes, self.counts.tolist()) >> 1

    def block(self, lane: int, k: int) -> Block:
        """The k-th block of a lane, k counted from 0 without end."""
        epoch, position = divmod(k * self.lanes + lane, self.blocks)
        number = self._epoch(epoch)[position]
        shard = int(np.searchsorted(self._shard_ends, number, side="right"))
        first = int(self._shard_ends[shard - 1]) if shard else 0
        start = (number - first) * self.block_size
        return Block(shard, start, min(self.block_size, int(self.counts[shard]) - start))


class Cursor:
    """A lane's place in one source: the samples in order, from (k, offset) on.

    `k` is the number of the lane's block, `offset` the next sample inside it.
    """

    def __init__(self, order: SourceOrder, lane: int, k: int = 0, offset: int = 0):
        self._order, self._lane = order, lane
        self.k, self.offset = k, offset
        self._block = order.block(lane, k)

    def next(self) -> tuple[int, int]:
        """(shard, sample) of the next sample."""
        shard, start, length = self._block
        sample = start + self.offset
        self.offset += 1
        if self.offset == length:
            self.k, self.offset = self.k + 1, 0
            self._block = self._order.block(self._lane, self.k)
        return shard, sample


class Mixture:
    """Which source a lane draws from next: the one furthest behind its weight.

    The deficit is taken relative to the weight, i.e. the source with the least
    (consumed + phase) / weight is next, in exact integers.  A source is then
    never more than one document off its share, and with phases uniform over a
    document the first draws of many lanes are in proportion to the weights,
    too.  (The absolute deficit, share * total - consumed, can't be phased so:
    its value just after a draw of a rare source is that of a common one.)

    Args:
        weights: relative weights.
        unit: what `consume` counts: tokens or documents.
        sequence_length: in tokens; scales the phases where tokens are counted.
        lane, seed: key of the phases.
        consumed: units drawn so far, of each source.
    """

    def __init__(
        self,
        weights: Sequence[float],
        unit: Literal["tokens", "documents"],
        sequence_length: int,
        lane: int,
        seed: int,
        consumed: Sequence[int],
    ):
        total = sum(map(Fraction, weights))
        self._weights = [max(1, round(Fraction(weight) / total * 2**40)) for weight in weights]
        # Documents have about an eighth of a sequence; were phases much longer, rare sources would start late.
        document = 1 if unit == "documents" else -(-sequence_length // 8)
        self._phases = [
            keyed_number("phase", seed, lane, source) % (document * PHASE_STEPS) for source in range(len(weights))
        ]
        self.consumed = list(consumed)

    def pick(self) -> int:
        """Index of the source to draw from."""
        best, best_progress, best_weight = 0, None, 1
        for source, weight in enumerate(self._weights):
            progress = self.consumed[source] * PHASE_STEPS + self._phases[source]
            if best_progress is None or progress * best_weight < best_progress * weight:
                best, best_progress, best_weight = source, progress, weight
        return best

    def consume(self, source: int, units: int) -> None:
        self.consumed[source] += units
