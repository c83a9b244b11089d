from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megablip.config import DataConfig
from megablip.data.order import SourceOrder, keyed_number
from megablip.data.pack import LanePlanner, LaneState, choose
from megablip.errors import CheckpointError, SampleError
from megablip.records import PlannedDocument, SampleAddress


def data_config(**changes):
    sources = [
        {"name": name, "shards": "unused", "schema": "text", "weight": weight}
        for name, weight in [("captions", 0.5), ("interleaved", 0.4), ("text", 0.1)]
    ]
    return DataConfig(
        **({"sources": sources, "sequence_length": 2048, "max_tiles": 12, "packing_buffer": 256} | changes)
    )


def measure(address):
    """A mixed trace: captions of one tile, interleaved documents of several, text."""
    number = keyed_number(address.source, address.shard, address.sample)
    if address.source == 0:
        return 128 + 20 + number % 120, 1
    if address.source == 1:
        tiles = 1 + number % 5
        return 128 * tiles + 100 + number % 500, tiles
    return 50 + number % 1500, 0


def planner(data, *, state=None, measure=measure, on_skip=lambda *_: None, lane=1, counts=(700, 800)):
    orders = [SourceOrder(source.name, np.array(counts), 4, seed=0) for source in data.sources]
    return LanePlanner(lane, data, 0, orders, measure, on_skip, state)


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 6)), min_size=1, max_size=40),
    st.integers(100, 300),
    st.integers(6, 12),
)
def test_a_choice_keeps_both_budgets_and_takes_the_oldest(sizes, max_tokens, max_tiles):
    waiting = [PlannedDocument(SampleAddress(0, 0, n), *size) for n, size in enumerate(sizes)]
    chosen = choose(waiting, max_tokens, max_tiles)
    tokens, tiles = sum(waiting[i].tokens for i in chosen), sum(waiting[i].tiles for i in chosen)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    assert tokens <= max_tokens
    assert tiles <= max_tiles
    left = [d for i, d in enumerate(waiting) if i not in chosen]
    assert not any(d.tokens <= max_tokens - tokens and d.tiles <= max_tiles - tiles for d in left)


def test_a_choice_takes_the_largest_that_fits_and_of_equals_the_older():
    sizes = [(10, 0), (30, 1), (60, 0), (60, 0), (25, 5), (5, 0)]
    waiting = [PlannedDocument(SampleAddress(0, 0, n), *size) for n, size in enumerate(sizes)]
    assert choose(waiting, 100, 4) == [0, 2, 1]


def test_sequences_are_full_of_tokens():
    data = data_config(max_tiles=16)
    plan = planner(data)
    tokens = [sum(d.tokens for d in plan.next_sequence().documents) for _ in range(400)]
    assert max(tokens) <= data.sequence_length
    assert np.mean(tokens) / data.sequence_length >= 0.97


def test_nothing_starves_and_each_document_comes_once():
    data = data_config(packing_buffer=64)
    plan = planner(data, counts=(7000, 8000))  # no second epoch
    emitted = [plan.next_sequence() for _ in range(150)]
    addresses = [d.address for sequence in emitted for d in sequence.documents]
    assert len(set(addresses)) == len(addresses)
    # What is oldest goes first, so a document waits at most one sequence for each one ahead of it.
    waiting = {}
    for sequence, following in pairwise(emitted):
        now = LaneState.from_vector(sequence.lane_state).waiting
        waiting = {d.address: waiting.get(d.address, 0) + 1 for d in now}
        assert max(waiting.values()) <= data.packing_buffer
        assert following.documents[0] == now[0]


@settings(max_examples=10)
@given(st.integers(0, 60), st.sampled_from(["tokens", "documents"]))
def test_a_lane_goes_on_from_its_state(stop, unit):
    data = data_config(packing_buffer=32, mixture_unit=unit)

    def bad_at_times(address):
        if keyed_number("bad", address) % 11 == 0:
            raise SampleError("broken")
        return measure(address)

    whole = planner(data, measure=bad_at_times)
    for _ in range(stop):
        whole.next_sequence()
    again = planner(data, measure=bad_at_times, state=whole.state.copy())
    for number in range(stop, stop + 12):
        a, b = whole.next_sequence(), again.next_sequence()
        assert a.index == b.index == number
        assert a.documents == b.documents
        assert np.array_equal(a.lane_state, b.lane_state)
    assert whole.skipped == again.skipped > 0


def test_resuming_measures_nothing_that_waits():
    data = data_config(packing_buffer=64)
    state = planner(data).next_sequence().lane_state
    assert state.dtype == np.int64
    waiting = len(LaneState.from_vector(state).waiting)
    measured = []
    plan = planner(data, state=state, measure=lambda address: measured.append(address) or measure(address))
    plan.next_sequence()
    assert len(measured) == data.packing_buffer - waiting


def test_bad_and_too_long_samples_are_counted_and_left_out():
    data, skipped = data_config(packing_buffer=16), []

    def some_bad(address):
        if address.sample % 7 == 0:
            raise SampleError("broken")
        return (5000, 0) if address.sample % 7 == 1 else (20, 13) if address.sample % 7 == 2 else measure(address)

    plan = planner(data, measure=some_bad, on_skip=lambda address, error: skipped.append((address, str(error))))
    documents = [d for _ in range(40) for d in plan.next_sequence().documents]
    assert all(d.address.sample % 7 > 2 for d in documents)
    assert plan.skipped == len(skipped) > 0
    assert plan.too_long > 0
    assert all(address.sample % 7 == 0 and error == "broken" for address, error in skipped)
    assert LaneState.from_vector(plan.state).skipped == plan.skipped
    assert LaneState.from_vector(plan.state).too_long == plan.too_long


@pytest.mark.parametrize("fault", ["bad", "too long"])
def test_a_hundred_failures_in_a_row_stop_the_lane(fault):
    calls = []

    def broken(address):
        calls.append(address)
        if fault == "bad":
            raise SampleError("no caption")
        return 10**6, 1

    with pytest.raises(SampleError, match="100 samples in a row") as caught:
        planner(data_config(), measure=broken).next_sequence()
    assert len(calls) == 100
    assert ("no caption" if fault == "bad" else "too long") in str(caught.value)
    assert caught.value.remedy


def test_a_state_that_does_not_fit_is_refused():
    data = data_config(packing_buffer=8)
    state = planner(data).next_sequence().lane_state
    with pytest.raises(CheckpointError, match="state is of lane 1"):
        planner(data, state=state, lane=2)
    with pytest.raises(CheckpointError, match="shards changed"):
        planner(data, state=state, counts=(700, 801))
    with pytest.raises(CheckpointError, match="wrong length"):
        planner(data, state=state[:-1])
    with pytest.raises(CheckpointError, match="version"):
        planner(data, state=np.concatenate([[99], state[1:]]))
    with pytest.raises(CheckpointError, match="version"):
        planner(data, state=state[:0])
