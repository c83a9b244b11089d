import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.data.order import Cursor, Mixture, Permutation, SourceOrder, block_size, keyed_number


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
    assert [Permutation(100, 0, "web", 0)[i] for i in range(5)] == [46, 87, 50, 97, 44]


def test_order_imports_no_torch():
    code = "import sys, megablip.data.order, megablip.data.pack, megablip.data.loader; print('torch' in sys.modules)"
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


def test_the_fingerprint_follows_the_shards():
    base = order_of(100, 4, 2)
    assert base.fingerprint == order_of(100, 4, 2).fingerprint < 2**63
    assert len({base.fingerprint, order_of(101, 4, 2).fingerprint, order_of(100, 5, 2).fingerprint}) == 3


WEIGHTS = [0.5, 0.3, 0.15, 0.04, 0.01]


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_a_mixture_keeps_its_shares_at_every_moment(unit):
    mixture = Mixture(WEIGHTS, unit, 4096, lane=3, seed=0, consumed=[0] * 5)
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
        mixture = Mixture(WEIGHTS, "documents", 4096, lane, seed=0, consumed=[0] * 5)
        for _ in range(3):
            source = mixture.pick()
            mixture.consume(source, 1)
            draws[source] += 1
    assert np.allclose(draws / draws.sum(), WEIGHTS, atol=0.02)


def test_a_mixture_goes_on_from_its_counts():
    mixture = Mixture(WEIGHTS, "tokens", 4096, 0, 0, [0] * 5)
    for length in range(1, 300):
        mixture.consume(mixture.pick(), length)
    again = Mixture(WEIGHTS, "tokens", 4096, 0, 0, mixture.consumed)
    for length in range(1, 300):
        source = mixture.pick()
        assert again.pick() == source
        mixture.consume(source, length)
        again.consume(source, length)
