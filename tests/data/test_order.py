import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.data.order import (
    STRATA,
    Cursor,
    Mixture,
    Permutation,
    ShardOrder,
    SourceOrder,
    block_size,
    keyed_number,
)
from megablip.errors import CheckpointError, ShardError


@given(st.integers(1, 400), st.integers())
def test_a_permutation_is_a_bijection(n, key):
    permutation = Permutation(n, key)
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 5, 17, 100])
def test_a_key_takes_a_position_to_any_place_alike(n):
    """Chi-squared over many keys, within 5 sigma of what chance gives."""
    keys = 5000
    counts = np.bincount([Permutation(n, key)[n // 2] for key in range(keys)], minlength=n)
    chi_squared = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert abs(chi_squared - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    permutation = Permutation(10**9, "s", 0)
    numbers = np.array([permutation[i] for i in range(3000)])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.08
    assert abs(numbers.mean() / 1e9 - 0.5) < 0.03


def test_keys_do_not_depend_on_the_process():
    code = "from megablip.data.order import *; print(keyed_number('a', 1), Permutation(999, 7, 'web', 2)[5])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [int(number) for number in printed] == [keyed_number("a", 1), Permutation(999, 7, "web", 2)[5]]


def test_values_are_pinned():
    """A change here changes the order of every run: checkpoints would go on with other data."""
    assert keyed_number("phase", 0, 1) == 160255391605269475
    assert [Permutation(100, 0, "web", 0)[i] for i in range(5)] == [14, 9, 83, 32, 63]


def test_order_imports_no_torch():
    code = "import sys, megablip.data.order, megablip.data.lanes, megablip.data.loader; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_block_size():
    assert block_size(3000, 512) == 1
    assert block_size(10**6, 100) == 64
    assert block_size(250_000, 100) == 25


def order_of(total, shards, lanes, seed=0):
    counts = np.full(shards, total // shards)
    counts[: total % shards] += 1
    return SourceOrder("web", counts, lanes, seed)


def drawn(order, lane, samples):
    cursor = Cursor(order, lane)
    return [cursor.next() for _ in range(samples)]


@pytest.mark.parametrize(("total", "shards", "lanes"), [(1000, 7, 4), (37, 5, 8), (20_000, 3, 2), (5, 5, 1)])
def test_lanes_together_see_each_sample_once_an_epoch(total, shards, lanes):
    order = order_of(total, shards, lanes)
    epochs = 3
    seen = Counter()
    for number in range(epochs * order.blocks):
        k, lane = divmod(number, lanes)
        shard, start, length = order.block(lane, k)
        assert 0 < length <= order.block_size
        seen.update((shard, sample) for sample in range(start, start + length))
    assert set(seen) == {(shard, s) for shard, count in enumerate(order.counts) for s in range(count)}
    assert set(seen.values()) == {epochs}


def test_epochs_sources_and_seeds_differ():
    first = order_of(1000, 4, 1)
    a = [first.block(0, k) for k in range(first.blocks)]
    assert sorted(a) == sorted(first.block(0, first.blocks + k) for k in range(first.blocks))
    assert a != [first.block(0, first.blocks + k) for k in range(first.blocks)]
    assert a != [order_of(1000, 4, 1, seed=1).block(0, k) for k in range(first.blocks)]
    other = SourceOrder("books", first.counts, 1, 0)
    assert a != [other.block(0, k) for k in range(first.blocks)]


def test_an_odd_epoch_goes_through_the_strata_backwards():
    order = order_of(1000, 4, 1)
    epochs = np.array([order.number(0, k) for k in range(3 * order.blocks)]).reshape(3, -1)
    strata = (epochs % STRATA).tolist()
    assert strata[0] == strata[2] == strata[1][::-1] == sorted(strata[0])
    assert epochs[0].tolist() != epochs[2].tolist()


@pytest.mark.parametrize(
    ("total", "epochs", "spread", "share"), [(3000, 1, 2, 1), (3000, 2, 2, 0.8), (3000, 5, 3, 0.7), (10_000, 5, 2, 1)]
)
def test_lanes_that_do_not_keep_pace_cover_a_source_evenly(total, epochs, spread, share):
    """512 lanes draw as many tokens each, and documents have log-normal lengths of sigma 0.5.

    Of 60 seeds 54 keep a spread of 3 at 3,000 samples and 5 epochs; where epochs
    are plain permutations half of them do.
    """
    lanes, even, seeds = 512, 0, 5 if total == 3000 else 2
    for seed in range(seeds):
        lengths = np.random.default_rng(seed).lognormal(0, 0.5, total)
        order = order_of(total, 1, lanes, seed)
        longest = round(3 * epochs * total / lanes) + 20
        places = np.array([[order.number(lane, k) for lane in range(lanes)] for k in range(longest)])
        before = np.cumsum(lengths[places], axis=0) - lengths[places]
        counts = np.bincount(places[before < lengths.sum() * epochs / lanes], minlength=total)
        assert epochs <= counts.mean() < epochs + 0.2  # a lane passes its tokens by half a document on average
        even += counts.max() - counts.min() <= spread
    assert even >= share * seeds


@pytest.mark.parametrize(("total", "lanes"), [(3000, 512), (3000, 8)])
def test_a_small_source_is_covered_evenly(total, lanes):
    order = order_of(total, 3, lanes)
    for epochs, spread in [(1, 2), (2, 2), (5, 3)]:
        seen = Counter()
        for lane in range(lanes):
            seen.update(drawn(order, lane, round(epochs * total / lanes)))
        counts = [seen[shard, sample] for shard, count in enumerate(order.counts) for sample in range(count)]
        assert max(counts) - min(counts) <= spread


def test_samples_inside_a_block_come_in_order():
    order = order_of(100_000, 10, 2)
    pairs = drawn(order, 0, 6400)
    assert order.block_size == 64
    follows = sum(b == (a[0], a[1] + 1) for a, b in pairwise(pairs))
    assert follows >= 6400 * 0.98


@given(st.integers(0, 400))
def test_a_cursor_goes_on_from_where_another_stopped(consumed):
    order = order_of(300, 4, 3)
    cursor = Cursor(order, 1)
    for _ in range(consumed):
        cursor.next()
    again = Cursor(order, 1, cursor.k, cursor.offset)
    assert [cursor.next() for _ in range(50)] == [again.next() for _ in range(50)]


@pytest.mark.parametrize(("total", "shards", "lanes"), [(1000, 7, 4), (37, 5, 64), (5, 5, 1)])
def test_a_cursor_ends_after_its_share_of_the_epochs(total, shards, lanes):
    order = order_of(total, shards, lanes)
    seen = Counter()
    for lane in range(lanes):
        cursor = Cursor(order, lane, epochs=2)
        while not cursor.ended:
            seen[cursor.next()] += 1
    assert len(seen) == total
    assert set(seen.values()) == {2}


def test_whole_shards_are_counted_only_when_entered():
    counted = []

    def count_of(shard):
        counted.append(shard)
        return 3 + shard

    order = ShardOrder("web", 6, count_of, 2, seed=0)
    cursors = [Cursor(order, lane) for lane in range(2)]
    assert counted == []
    first = cursors[0].next()
    assert counted == [first[0]]
    seen = [first] + [cursors[0].next() for _ in range(2 + first[0])]
    assert seen == [(first[0], sample) for sample in range(3 + first[0])]
    assert len(counted) == 1
    seen = {order.block(lane, k).shard for lane in range(2) for k in range(3)}
    assert seen == set(range(6))
    again = Cursor(order, 0, 0, 2)
    assert again.next() == (first[0], 2)


def test_a_source_without_samples_is_refused():
    with pytest.raises(ShardError, match="no sample"):
        SourceOrder("web", np.zeros(0), 2, 0)
    with pytest.raises(ShardError, match="no sample"):
        SourceOrder("web", np.zeros(3), 2, 0)
    with pytest.raises(ShardError, match="shard has no sample"):
        Cursor(ShardOrder("web", 3, lambda shard: 0, 2, 0), 0).next()


def test_a_shard_that_shrank_below_the_cursor_is_refused():
    with pytest.raises(CheckpointError, match=r"sample 9 of a shard.*only 4"):
        Cursor(ShardOrder("web", 3, lambda shard: 4, 1, 0), 0, 0, 9).next()


def test_the_fingerprint_follows_the_shards():
    base = order_of(100, 4, 2)
    assert base.fingerprint == order_of(100, 4, 2).fingerprint < 2**63
    whole = [ShardOrder("web", shards, lambda shard: 1, 2, 0).fingerprint for shards in (4, 5)]
    assert len({base.fingerprint, order_of(101, 4, 2).fingerprint, order_of(100, 5, 2).fingerprint, *whole}) == 5
    replaced = [
        SourceOrder("web", base.counts, 2, 0, "other headers").fingerprint,
        ShardOrder("web", 4, lambda shard: 1, 2, 0, "other names").fingerprint,
    ]
    assert len({base.fingerprint, *whole, *replaced}) == 5


WEIGHTS = [0.5, 0.3, 0.15, 0.04, 0.01]


def mixture_of(weights=WEIGHTS, unit="tokens", lane=0, consumed=None):
    mixture = Mixture([f"source {number}" for number in range(len(weights))], unit, 4096, lane, seed=0)
    mixture.begin(weights, consumed)
    return mixture


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_a_mixture_keeps_its_shares_at_every_moment(unit):
    mixture = mixture_of(unit=unit, lane=3)
    lengths = np.random.default_rng(0).integers(20, 1500, 200_000)
    largest = 1500 if unit == "tokens" else 1
    for number, length in enumerate(lengths):
        mixture.consume(mixture.pick(), int(length) if unit == "tokens" else 1)
        if number % 5000 == 0:
            total = sum(mixture.consumed)
            errors = [abs(c - w * total) for c, w in zip(mixture.consumed, WEIGHTS, strict=True)]
            assert max(errors) <= 2 * largest
    assert np.allclose(np.array(mixture.consumed) / sum(mixture.consumed), WEIGHTS, atol=1e-3)


def test_lanes_start_with_sources_in_proportion():
    """Not all with the same one, and few with a rare one."""
    draws = np.zeros(5)
    for lane in range(2000):
        mixture = mixture_of(unit="documents", lane=lane)
        for _ in range(3):
            source = mixture.pick()
            mixture.consume(source, 1)
            draws[source] += 1
    assert np.allclose(draws / draws.sum(), WEIGHTS, atol=0.02)


def test_a_mixture_goes_on_from_its_counts():
    mixture = mixture_of()
    for length in range(1, 300):
        mixture.consume(mixture.pick(), length)
    again = mixture_of(consumed=mixture.consumed)
    for length in range(1, 300):
        source = mixture.pick()
        assert again.pick() == source
        mixture.consume(source, length)
        again.consume(source, length)


def draws_of(mixture, number):
    drawn = np.zeros(len(WEIGHTS), int)
    for _ in range(number):
        source = mixture.pick()
        mixture.consume(source, 1)
        drawn[source] += 1
    return drawn


def test_new_weights_hold_from_when_they_begin():
    mixture = mixture_of(unit="documents")
    draws_of(mixture, 10_000)
    mixture.begin([0, 0.1, 0.1, 0.3, 0.5])  # by the counts so far, the last would be owed 5,000 documents
    assert np.allclose(draws_of(mixture, 1000), [0, 100, 100, 300, 500], atol=2)


def test_the_weights_hold_among_those_that_are_left():
    mixture = mixture_of(unit="documents")
    draws_of(mixture, 1000)
    mixture.drop(0)
    assert np.allclose(draws_of(mixture, 1000), [0, 600, 300, 80, 20], atol=3)
    mixture.begin(WEIGHTS)
    assert draws_of(mixture, 100)[0] == 0
    for source in range(1, 5):
        mixture.drop(source)
    assert mixture.pick() is None
