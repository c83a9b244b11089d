"""The order of data: pure functions of (seed, source, lane, position).

A lane is a logical data-parallel rank.  A source is cut into blocks of
consecutive samples; lane l's k-th block is number k * lanes + l of an endless
sequence of epochs, each a keyed permutation of the blocks.  So the lanes
together see every sample once an epoch, no lane needs to know another, and any
position is reached in O(1) time and memory.

Lanes do not keep pace: documents differ in length, and after E epochs of b
blocks a lane is off by about sqrt(E / b) / 2 epochs.  A block that two hasty
lanes have in epochs e and e + 1 would then be two visits ahead of the mean.  So
an epoch is made of strata, each shuffled anew, and odd epochs go through them
backwards: what comes late in one epoch comes early in the next, and both visits
are early only where both lanes are far ahead.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from math import inf
from struct import unpack
from typing import Literal, NamedTuple

import numpy as np

from megablip.errors import CheckpointError, ShardError

MAX_BLOCK_SAMPLES = 64  # long enough for sequential reads
BLOCKS_PER_LANE = 100  # at least so many an epoch, so that a small source is covered evenly at every moment
STRATA = 8  # of an epoch; more gain nothing
PHASE_STEPS = 1024  # resolution of a lane's phase, in parts of a unit

_ROUNDS = 8
_MASK = 2**64 - 1


def keyed_number(*key: object) -> int:
    """A 64-bit number that depends on `key` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(_bytes(key), digest_size=8).digest(), "little")


def _keyed_numbers(*key: object) -> list[int]:
    """2 * _ROUNDS such numbers, that are cheaper together."""
    text = _bytes(key)
    halves = (hashlib.blake2b(text, person=half).digest() for half in (b"first", b"second"))
    return list(unpack(f"<{2 * _ROUNDS}Q", b"".join(halves)))


def _bytes(key: tuple[object, ...]) -> bytes:
    return "\x1f".join(map(str, key)).encode("utf-8", "surrogateescape")


class Permutation:
    """A keyed pseudo-random permutation of range(n) in O(1) memory.

    A Feistel network on the smallest number of bits that holds n, walked on
    until it lands inside the range (cycle walking: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", CT-RSA 2002); that takes two walks at most
    on average.  Its rounds hash by multiply-add-shift (Dietzfelbinger, "Universal
    hashing and k-wise independent random variables via integer arithmetic
    without primes", STACS 1996): much cheaper than a cipher's, and nobody attacks.
    """

    __slots__ = ("_low_bits", "_low_mask", "_rounds", "_shifts", "n")

    def __init__(self, n: int, *key: object):
        bits = max(2, (n - 1).bit_length())
        self.n = n
        self._low_bits = bits // 2
        self._low_mask = (1 << bits // 2) - 1
        self._shifts = (64 - (bits - bits // 2), 64 - bits // 2)
        numbers = _keyed_numbers("permutation", *key)
        # Of two rounds each: what is added and, odd, what is multiplied with.
        self._rounds = [(a, b | 1, c, d | 1) for a, b, c, d in zip(*[iter(numbers)] * 4, strict=True)]

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        high_shift, low_shift = self._shifts
        while True:
            high, low = position >> self._low_bits, position & self._low_mask
            for add_low, times_low, add_high, times_high in self._rounds:
                high ^= ((low + add_low) * times_low & _MASK) >> high_shift
                low ^= ((high + add_high) * times_high & _MASK) >> low_shift
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


class EpochOrder:
    """The order in which lanes take the blocks 0 ... `blocks` - 1 of a source, epoch after epoch.

    Args:
        name: of the source, part of the key, so that sources differ.
        blocks: their number.
        lanes: number of lanes of the stage.
        seed: of the run.

    Raises:
        ShardError: there is no block.
    """

    def __init__(self, name: str, blocks: int, lanes: int, seed: int):
        if blocks < 1:
            raise ShardError("the source has no sample", where=f"source {name}", remedy="check its shards")
        self.name, self.blocks, self.lanes, self.seed = name, blocks, lanes, seed
        self._strata = min(STRATA, blocks)
        # Stratum j holds the blocks j, j + strata, j + 2 * strata ...: all shards have a part in each.
        sizes = [-(-(blocks - stratum) // self._strata) for stratum in range(self._strata)]
        self._stratum_starts = [0, *accumulate(sizes[:-1])]
        self._shuffle = lru_cache(maxsize=4 * STRATA)(
            lambda epoch, stratum: Permutation(sizes[stratum], seed, name, epoch, stratum)
        )

    def number(self, lane: int, k: int) -> int:
        """Number of the k-th block of a lane, k counted from 0 without end."""
        epoch, place = divmod(k * self.lanes + lane, self.blocks)
        if epoch % 2:
            place = self.blocks - 1 - place
        stratum = bisect_right(self._stratum_starts, place) - 1
        inside = self._shuffle(epoch, stratum)[place - self._stratum_starts[stratum]]
        return inside * self._strata + stratum

    def blocks_of(self, lane: int, epochs: int) -> int:
        """Blocks that a lane takes in the first `epochs` epochs."""
        return max(0, -(-(epochs * self.blocks - lane) // self.lanes))


class SourceOrder(EpochOrder):
    """The order of one source for all lanes, where the numbers of samples are known.

    Args:
        name, lanes, seed: as for EpochOrder.
        counts: int64[shards], samples of each shard.
        identity: text that differs where the shards are others with as many samples.

    Raises:
        ShardError: there is no sample.
    """

    def __init__(self, name: str, counts: np.ndarray, lanes: int, seed: int, identity: str = ""):
        self._identity = identity
        self.counts = np.asarray(counts, np.int64)
        self.block_size = block_size(int(self.counts.sum()), lanes)
        blocks = -(-self.counts // self.block_size)  # of each shard; none straddles shards
        # Lists, as this is asked for each block, and numpy is slow to give a single number.
        self._shard_counts, self._shard_ends = self.counts.tolist(), np.cumsum(blocks).tolist()
        super().__init__(name, int(blocks.sum()), lanes, seed)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that change when a shard is added, removed, replaced, or changes its number of samples."""
        counts = self.counts.astype("<i8").tobytes().hex()
        return keyed_number("samples", self.name, self.lanes, counts, self._identity) >> 1

    def block(self, lane: int, k: int) -> Block:
        """The k-th block of a lane, k counted from 0 without end."""
        number = self.number(lane, k)
        shard = bisect_right(self._shard_ends, number)
        start = (number - (self._shard_ends[shard - 1] if shard else 0)) * self.block_size
        return Block(shard, start, min(self.block_size, self._shard_counts[shard] - start))


class ShardOrder(EpochOrder):
    """The order of a source whose blocks are whole shards, counted only when a lane comes to them.

    Args:
        name, lanes, seed: as for EpochOrder.
        shards: their number.
        count_of: gives the number of samples of a shard.
        identity: text that differs where as many shards are others.

    Raises:
        ShardError: there is no shard.
    """

    def __init__(
        self, name: str, shards: int, count_of: Callable[[int], int], lanes: int, seed: int, identity: str = ""
    ):
        super().__init__(name, shards, lanes, seed)
        self._count_of, self._identity = count_of, identity

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that change when a shard is added, removed or replaced."""
        return keyed_number("shards", self.name, self.lanes, self.blocks, self._identity) >> 1

    def block(self, lane: int, k: int) -> Block:
        """The k-th shard of a lane, k counted from 0 without end.

        Raises:
            ShardError: the shard is empty, or what `count_of` raises.
        """
        shard = self.number(lane, k)
        count = self._count_of(shard)
        if count < 1:
            raise ShardError(
                "the shard has no sample", where=f"source {self.name}, shard {shard}", remedy="take it out"
            )
        return Block(shard, 0, count)


class Cursor:
    """A lane's place in one source: the samples in order, from (k, offset) on.

    `k` is the number of the lane's block, `offset` the next sample inside it.

    Args:
        order: of the source.
        lane: whose place it is.
        k, offset: where to go on.
        epochs: the cursor ends after so many; None: never.
    """

    __slots__ = ("_block", "_end", "_lane", "_order", "k", "offset")

    def __init__(
        self, order: SourceOrder | ShardOrder, lane: int, k: int = 0, offset: int = 0, epochs: int | None = None
    ):
        self._order, self._lane = order, lane
        self.k, self.offset = k, offset
        self._end = None if epochs is None else order.blocks_of(lane, epochs)
        self._block: Block | None = None  # until a sample of it is asked for: it may have to be counted

    @property
    def ended(self) -> bool:
        """No sample is left to this lane."""
        return self._end is not None and self.k >= self._end

    def next(self) -> tuple[int, int]:
        """(shard, sample) of the next sample; not to be called once `ended`.

        Raises:
            ShardError: the next shard can't be counted.
            CheckpointError: the shard has fewer samples than were taken from it.
        """
        if self._block is None:
            self._block = self._enter()
        shard, start, length = self._block
        sample = start + self.offset
        self.offset += 1
        if self.offset == length:
            self.k, self.offset, self._block = self.k + 1, 0, None
        return shard, sample

    def _enter(self) -> Block:
        block = self._order.block(self._lane, self.k)
        if self.offset >= block.length:
            raise CheckpointError(
                f"the lane goes on at sample {self.offset} of a shard or block that has only {block.length}",
                where=f"source {self._order.name}, shard {block.shard}, lane {self._lane}",
                remedy="bring the shard back as it was, or start a new run",
            )
        return block


class Mixture:
    """Which source a lane draws from next: the one furthest behind its weight.

    The deficit is taken relative to the weight, i.e. the source with the least
    (consumed + phase) / weight is next, in exact integers.  A source is then
    never more than one document off its share, and with phases uniform over a
    document the first draws of many lanes are in proportion to the weights,
    too.  (The absolute deficit, share * total - consumed, can't be phased so:
    its value just after a draw of a rare source is that of a common one.)

    Args:
        names: of the sources.
        unit: what `consume` counts: tokens or documents.
        sequence_length: in tokens; scales the phases where tokens are counted.
        lane, seed: key of the phases.
    """

    def __init__(
        self,
        names: Sequence[str],
        unit: Literal["tokens", "documents"],
        sequence_length: int,
        lane: int,
        seed: int,
    ):
        # Documents have about an eighth of a sequence; were phases much longer, rare sources would start late.
        document = 1 if unit == "documents" else -(-sequence_length // 8)
        self._phases = [keyed_number("phase", seed, lane, name) % (document * PHASE_STEPS) for name in names]
        self._out = [False] * len(names)
        self._costs: list[int] = []
        self._progress: list[float] = []  # integers, or infinity for a source that is not drawn from
        self.consumed: list[int] = []

    def begin(self, weights: Sequence[float], consumed: Sequence[int] | None = None) -> None:
        """Share out anew.

        Args:
            weights: relative weight of each source; 0: not drawn from.
            consumed: units drawn of each since these weights hold; None: none yet.
        """
        total = sum(map(Fraction, weights))
        self._costs = [round(total / Fraction(weight) * 2**30) if weight else 0 for weight in weights]
        self.consumed = [0] * len(self._phases) if consumed is None else list(consumed)
        self._progress = [
            inf if out or not cost else (units * PHASE_STEPS + phase) * cost
            for out, cost, units, phase in zip(self._out, self._costs, self.consumed, self._phases, strict=True)
        ]

    def pick(self) -> int | None:
        """Index of the source to draw from; None if all are exhausted."""
        least = min(self._progress)
        return None if least == inf else self._progress.index(least)

    def consume(self, source: int, units: int) -> None:
        self.consumed[source] += units
        self._progress[source] += units * PHASE_STEPS * self._costs[source]

    def drop(self, source: int) -> None:
        """The source is exhausted: the weights hold among the rest."""
        self._out[source] = True
        self._progress[source] = inf
