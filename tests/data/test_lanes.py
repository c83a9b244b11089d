import io
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megablip.config import DataConfig
from megablip.data.lanes import LanePlanner, LaneState
from megablip.data.order import ShardOrder, SourceOrder, keyed_number
from megablip.errors import CheckpointError, SampleError
from megablip.records import SampleAddress

WEIGHTS = {"captions": 0.5, "interleaved": 0.4, "text": 0.1}


def data_config(weights=WEIGHTS, split="never", **changes):
    sources = [
        {"name": name, "shards": "unused", "schema": "text", "weight": weight, "split": split}
        for name, weight in weights.items()
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


class Long:
    """Some samples are longer than a sequence: five images and text, or an image that nothing holds."""

    def __call__(self, address):
        segments = self.segments(address)
        return sum(tokens for tokens, _ in segments), sum(tiles for _, tiles in segments)

    def segments(self, address):
        number = keyed_number("long", address)
        if number % 29 == 1:
            return [(10, 0), (5000, 9)]
        if number % 7 == 0:
            return [(3000 + number % 3000, 0), *[(512, 4), (100, 0)] * 5]
        tokens, tiles = measure(address)
        return [(tokens - 128 * tiles, 0), *[(128, 1)] * tiles]


def planner(
    data, *, state=None, measure=measure, on_skip=lambda *_: None, lane=1, lanes=4, counts=(700, 800), **kwargs
):
    orders = kwargs.pop("orders", None) or [
        SourceOrder(source.name, np.array(counts), lanes, seed=0) for source in data.sources
    ]
    sequences_per_lane = kwargs.pop("sequences_per_lane", 1)
    return LanePlanner(lane, data, 0, sequences_per_lane, orders, measure, on_skip, state, **kwargs)


def assert_go_on_alike(whole, again, sequences):
    for _ in range(sequences):
        a, b = whole.next_sequence(), again.next_sequence()
        assert (a.index, a.documents) == (b.index, b.documents)
        assert np.array_equal(a.lane_state, b.lane_state)


def test_sequences_are_full_of_tokens():
    data = data_config(max_tiles=16)
    plan = planner(data)
    tokens = [sum(d.tokens for d in plan.next_sequence().documents) for _ in range(400)]
    assert max(tokens) <= data.sequence_length
    assert np.mean(tokens) / data.sequence_length >= 0.99


def test_nothing_starves_and_each_document_comes_once():
    data = data_config(packing_buffer=64)
    plan = planner(data, counts=(7000, 8000))  # no second epoch
    emitted = [plan.next_sequence() for _ in range(150)]
    addresses = [d.address for sequence in emitted for d in sequence.documents]
    assert len(set(addresses)) == len(addresses)
    waiting = {}
    for sequence, following in pairwise(emitted):
        now = LaneState(sequence.lane_state).waiting
        waiting = {d.address: waiting.get(d.address, 0) + 1 for d in now}
        assert max(waiting.values()) <= data.packing_buffer
        assert following.documents[0] == now[0]


@settings(max_examples=10, deadline=None)
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
    assert again.index == stop
    assert_go_on_alike(whole, again, 12)
    assert whole.skipped == again.skipped > 0


def test_going_on_at_any_sequence_also_in_the_middle_of_documents_and_in_later_epochs():
    data = data_config(split="text", packing_buffer=24)
    states = []
    whole = planner(data, measure=Long(), counts=(40, 50))
    for _ in range(400):
        states.append(whole.next_sequence().lane_state)
    assert LaneState(states[-1]).drawn.min() > 90 / 4  # the lane's share of an epoch
    stops = random.Random(0).sample(range(len(states) - 12), 20)
    assert any(has_begun_a_document(states[stop]) for stop in stops)
    for stop in stops:
        again = planner(data, measure=Long(), counts=(40, 50), state=states[stop])
        for state in states[stop + 1 : stop + 13]:
            assert np.array_equal(again.next_sequence().lane_state, state)


def has_begun_a_document(state):
    """Pieces wait of a sample whose first piece has left."""
    waiting = LaneState(state).waiting
    return {d.address for d in waiting} > {d.address for d in waiting if not d.start}


def test_resuming_measures_nothing_that_waits():
    data = data_config(packing_buffer=64)
    state = planner(data).next_sequence().lane_state
    assert state.dtype == np.int64
    waits = len(LaneState(state).waiting)
    measured = []
    plan = planner(data, state=state, measure=lambda address: measured.append(address) or measure(address))
    plan.next_sequence()
    assert len(measured) == data.packing_buffer - waits


def test_bad_and_too_long_samples_are_counted_and_left_out():
    data, skipped = data_config(packing_buffer=16), []

    def some_bad(address):
        if address.sample % 7 == 0:
            raise SampleError("broken")
        return (5000, 0) if address.sample % 7 == 1 else (20, 13) if address.sample % 7 == 2 else measure(address)

    plan = planner(data, measure=some_bad, on_skip=lambda address, error: skipped.append((address, str(error))))
    documents = [d for _ in range(40) for d in plan.next_sequence().documents]
    assert all(d.address.sample % 7 > 2 for d in documents)
    assert all(address.sample % 7 == 0 and error == "broken" for address, error in skipped)
    state = LaneState(plan.state)
    assert state.skipped == plan.skipped == len(skipped) > 0
    assert state.dropped == plan.dropped > 0
    assert state.drawn.sum() == len(documents) + len(state.waiting) + state.skipped + state.dropped
    assert state.samples_done == len(documents) + state.skipped + state.dropped


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
    alien = state.copy()
    alien[-8] = 3
    with pytest.raises(CheckpointError, match="state is of lane 1"):
        planner(data, state=state, lane=2)
    with pytest.raises(CheckpointError, match="wrong length"):
        planner(data, state=state[:-1])
    with pytest.raises(CheckpointError, match="source the state lacks"):
        planner(data, state=alien)
    with pytest.raises(CheckpointError, match="version"):
        planner(data, state=np.concatenate([[99], state[1:]]))
    with pytest.raises(CheckpointError, match="version"):
        planner(data, state=state[:0])


# --- documents that are cut ---------------------------------------------------


def test_too_long_documents_are_cut_and_each_token_comes_once():
    data = data_config(split="text", packing_buffer=32)
    plan = planner(data, measure=Long(), counts=(7000, 8000))
    pieces, states = {}, []
    for _ in range(300):
        sequence = plan.next_sequence()
        states.append(LaneState(sequence.lane_state))
        for document in sequence.documents:
            pieces.setdefault(document.address, []).append(document)
    for sample, costs in pieces.items():
        tokens, tiles = Long()(sample)
        assert [d.start for d in costs] == np.cumsum([0, *(d.tokens for d in costs)])[:-1].tolist()  # in order, no gap
        assert [d.last for d in costs[:-1]] == [False] * (len(costs) - 1)
        if costs[-1].last:
            assert (sum(d.tokens for d in costs), sum(d.tiles for d in costs)) == (tokens, tiles)
        assert len(costs) == 1 or tokens > data.sequence_length or tiles > data.max_tiles
    assert states[-1].cut > 10
    assert states[-1].dropped > 10
    done = sum(documents[-1].last for documents in pieces.values())
    assert states[-1].samples_done == done + states[-1].dropped
    assert states[-1].done.sum() == states[-1].samples_done


def test_segments_are_asked_only_for_what_is_to_be_cut():
    asked = []

    class Asked(Long):
        def segments(self, address):
            asked.append(address)
            return super().segments(address)

        def __call__(self, address):
            return Long()(address)

    data = data_config(split="text", packing_buffer=32)
    plan = planner(data, measure=Asked())
    for _ in range(20):
        plan.next_sequence()
    assert len(asked) == plan.cut + plan.dropped > 0
    never = planner(data_config(packing_buffer=32), measure=Long())
    never.next_sequence()
    assert never.cut == 0 < never.dropped


# --- epochs -------------------------------------------------------------------


def run_epochs(lanes, epochs, orders_of, data, seed):
    """Each sample's count over all lanes, each lane interrupted five times."""
    seen, dry = Counter(), []
    rng = random.Random(seed)
    for lane in range(lanes):
        plan = planner(data, lane=lane, orders=orders_of(), epochs=epochs)
        stops = set(rng.sample(range(1, 60), 5))
        while True:
            sequence = plan.next_sequence()
            state = LaneState(sequence.lane_state)
            seen.update((d.address.source, d.address.shard, d.address.sample) for d in sequence.documents)
            assert bool(sequence.documents) or state.is_dry
            if sequence.index in stops:
                plan = planner(data, lane=lane, orders=orders_of(), epochs=epochs, state=sequence.lane_state)
            if state.is_dry:
                break
        dry.append(state)
        assert plan.next_sequence().documents == plan.next_sequence().documents == ()
        assert LaneState(plan.state).is_dry
    return seen, dry


def test_all_lanes_see_each_sample_once_an_epoch_through_interruptions():
    total, shards, lanes, epochs = 10_007, 37, 64, 2
    counts = np.full(shards, total // shards)
    counts[: total % shards] += 1
    data = data_config({"captions": 1}, packing_buffer=32)

    def orders_of():
        return [SourceOrder("captions", counts, lanes, seed=0)]

    seen, dry = run_epochs(lanes, epochs, orders_of, data, seed=0)
    assert len(seen) == total
    assert set(seen.values()) == {epochs}
    assert sum(state.samples_done for state in dry) == sum(int(state.drawn.sum()) for state in dry) == epochs * total


def test_an_exhausted_source_is_out_and_the_weights_hold_among_the_rest():
    totals = [40, 600, 900]
    data = data_config(mixture_unit="documents", packing_buffer=16)

    def orders_of():
        return [SourceOrder(s.name, np.array([n]), 3, 0) for s, n in zip(data.sources, totals, strict=True)]

    seen, _ = run_epochs(3, 1, orders_of, data, seed=1)
    assert len(seen) == sum(totals)
    assert set(seen.values()) == {1}
    plan = planner(data, lane=0, lanes=3, orders=orders_of(), epochs=1)
    while (state := LaneState(plan.next_sequence().lane_state)).drawn.sum() < 150:
        pass
    # 14 captions of this lane, then interleaved to text as 4 to 1.
    drawn = state.drawn
    assert drawn[0] == 14
    assert abs(drawn[1] - 0.8 * (drawn.sum() - 14)) < 3


def test_a_lane_without_a_share_is_dry_from_the_start():
    data = data_config({"captions": 1})
    plan = planner(data, lane=9, orders=[SourceOrder("captions", np.array([5]), 10, 0)], epochs=1)
    sequence = plan.next_sequence()
    assert sequence.documents == ()
    assert LaneState(sequence.lane_state).is_dry


# --- weights that follow a schedule -------------------------------------------


def test_weights_follow_their_schedule_by_the_step():
    schedules = {"captions": [[0, 1], [200, 0]], "interleaved": 1, "text": [[0, 0], [200, 3]]}
    data = data_config(schedules, mixture_unit="documents", packing_buffer=8)
    whole = planner(data, sequences_per_lane=2)
    states = [whole.next_sequence().lane_state for _ in range(700)]
    drawn = [LaneState(state).drawn for state in states]
    assert drawn[399][2] == 0
    assert abs(drawn[399][0] - drawn[399][1]) <= 1
    late = drawn[-1] - drawn[399]  # step 200 is sequence 400
    assert late[0] == 0
    assert abs(late[2] - 3 * late[1]) <= 4
    assert drawn[400][2] > 0
    for stop in (398, 399, 400, 650):
        again = planner(data, sequences_per_lane=2, state=states[stop])
        for state in states[stop + 1 : stop + 4]:
            assert np.array_equal(again.next_sequence().lane_state, state)


# --- sources that change on resume --------------------------------------------


def orders_of(data, **counts):
    return [SourceOrder(s.name, np.array(counts.get(s.name, [700, 800])), 4, seed=0) for s in data.sources]


CHANGES = {
    "added": (WEIGHTS | {"web": 0.3}, {}, "source web is new"),
    "removed": ({"captions": 0.5, "text": 0.1}, {}, "source 1 of the checkpoint's list"),
    "reweighed": (WEIGHTS | {"text": 0.2}, {}, "source text has another weight"),
    "other shards": (WEIGHTS, {"text": [700, 801]}, "source text has other shards"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sources_change_only_with_leave(change):
    data = data_config(packing_buffer=64)
    old = planner(data)
    for _ in range(30):
        old.next_sequence()
    before = LaneState(old.state)
    weights, counts, message = CHANGES[change]
    changed = data_config(weights, packing_buffer=64)
    with pytest.raises(CheckpointError, match=message) as caught:
        planner(changed, state=old.state, orders=orders_of(changed, **counts))
    assert "allow_changes: [data.sources]" in caught.value.remedy
    plan = planner(changed, state=old.state, orders=orders_of(changed, **counts), allow_source_changes=True)
    assert [message in line for line in plan.source_changes] == [True]
    after = LaneState(plan.state)
    restarted = {"text"} if change == "other shards" else set()
    kept = [name for name in weights if name in WEIGHTS and name not in restarted]
    old_names, new_names = list(WEIGHTS), list(weights)
    for name in new_names:
        drawn = after.drawn[new_names.index(name)]
        assert drawn == (before.drawn[old_names.index(name)] if name in kept else 0)
    assert [(new_names[d.address.source], d.tokens) for d in after.waiting] == [
        (old_names[d.address.source], d.tokens) for d in before.waiting if old_names[d.address.source] in kept
    ]
    assert not after.sources[:, -1].any()  # units are counted anew
    # From here on the new weights hold, and the lane goes on from its state without leave.
    for _ in range(60):
        plan.next_sequence()
    consumed = LaneState(plan.state).sources[:, -1]
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert np.allclose(consumed / consumed.sum(), shares, atol=0.05)
    again = planner(changed, state=plan.state, orders=orders_of(changed, **counts))
    assert again.source_changes == ()
    assert_go_on_alike(plan, again, 5)


def test_the_order_in_which_sources_are_listed_is_free():
    data, turned = data_config(), data_config(dict(reversed(WEIGHTS.items())))
    old = planner(data)
    state = old.next_sequence().lane_state
    new = planner(
        turned,
        state=state,
        measure=lambda address: measure(SampleAddress(2 - address.source, *(address.shard, address.sample))),
    )
    assert new.source_changes == ()
    for _ in range(20):
        a, b = old.next_sequence().documents, new.next_sequence().documents
        assert [(2 - d.address.source, d.address.shard, d.address.sample) for d in a] == [
            (d.address.source, d.address.shard, d.address.sample) for d in b
        ]


# --- sources of whole shards, sizes -------------------------------------------


def test_a_source_of_whole_shards_goes_on_inside_a_shard():
    data = data_config({"captions": 1}, packing_buffer=8)

    def shards():
        return [ShardOrder("captions", 9, lambda shard: 20 + shard, 4, seed=0)]

    whole = planner(data, orders=shards())
    for _ in range(37):
        whole.next_sequence()
    assert_go_on_alike(whole, planner(data, orders=shards(), state=whole.state), 20)


def test_the_waiting_documents_of_512_lanes_on_one_rank_are_small():
    """100 MB of a process's memory, and 5 MB in a compressed checkpoint."""
    data = data_config({f"source {number}": 1 + number for number in range(11)})
    orders = [SourceOrder(source.name, np.full(100, 10_000), 512, seed=0) for source in data.sources]

    def plan(lane):
        lane = planner(
            data, lane=lane, orders=orders, measure=lambda a: measure(SampleAddress(a.source % 3, a.shard, a.sample))
        )
        lane.next_sequence()
        return lane

    plan(0)  # what all lanes share
    process = psutil.Process()
    before = process.memory_info().rss
    lanes = [plan(lane) for lane in range(512)]
    assert process.memory_info().rss - before < 100e6
    file = io.BytesIO()
    np.savez_compressed(file, **{str(lane.lane): lane.state for lane in lanes})
    assert file.tell() < 5e6
