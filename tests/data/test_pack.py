import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megablip.data.pack import COLUMNS, PackingBuffer
from megablip.errors import PackingError
from megablip.records import PlannedDocument, SampleAddress

SIZES = st.tuples(st.integers(1, 100), st.integers(0, 6))


def documents(sizes):
    return [PlannedDocument(SampleAddress(0, 1, number), *size) for number, size in enumerate(sizes)]


def snapshot(buffer):
    return np.frombuffer(buffer.rows(), np.int64).reshape(-1, len(COLUMNS))


def resumed(buffer, size):
    return PackingBuffer(buffer.max_tokens, buffer.max_tiles, size, snapshot(buffer), buffer.added)


def emitted(buffer, waiting, size):
    """Sequences until nothing waits, the buffer refilled before each."""
    waiting = iter(waiting)
    while True:
        while len(buffer) < size and (document := next(waiting, None)):
            buffer.add(document)
        if not len(buffer):
            return
        yield buffer.take()


@given(st.lists(SIZES, max_size=80), st.integers(100, 300), st.integers(6, 12), st.integers(1, 40))
def test_budgets_are_kept_and_nothing_is_lost_or_starves(sizes, max_tokens, max_tiles, size):
    buffer = PackingBuffer(max_tokens, max_tiles, size)
    waiting = documents(sizes)
    sequences = list(emitted(buffer, waiting, size))
    for sequence in sequences:
        assert sum(document.tokens for document in sequence) <= max_tokens
        assert sum(document.tiles for document in sequence) <= max_tiles
        assert list(sequence) == sorted(sequence, key=lambda document: document.address.sample)
    assert sorted((d for sequence in sequences for d in sequence), key=lambda d: d.address.sample) == waiting
    # Every sequence takes what waits longest, so the n-th that was added is in the n-th sequence at the latest.
    gone = set()
    for sequence in sequences:
        assert sequence[0] == min(set(waiting) - gone, key=lambda document: document.address.sample)
        gone |= set(sequence)
    assert buffer.take() == ()


@given(st.lists(SIZES, min_size=1, max_size=40), st.integers(100, 300), st.integers(6, 12))
def test_a_sequence_has_room_for_none_that_waits(sizes, max_tokens, max_tiles):
    buffer = PackingBuffer(max_tokens, max_tiles, 40)
    waiting = documents(sizes)
    for document in waiting:
        buffer.add(document)
    sequence = buffer.take()
    tokens, tiles = sum(d.tokens for d in sequence), sum(d.tiles for d in sequence)
    left = set(waiting) - set(sequence)
    assert not any(d.tokens <= max_tokens - tokens and d.tiles <= max_tiles - tiles for d in left)


@settings(max_examples=100, deadline=None)
@given(
    # Few lengths: a piece that may follow then has to find its place by age among equals.
    st.lists(st.tuples(st.sampled_from([20, 40, 60]), st.integers(0, 6)), min_size=30, max_size=80),
    st.integers(0, 15),
    st.booleans(),
)
def test_a_buffer_goes_on_from_its_snapshot(sizes, stop, with_pieces):
    waiting = documents(sizes)
    if with_pieces:
        address = SampleAddress(2, 0, 0)
        waiting[10:10] = [PlannedDocument(address, 40, 3, 40 * number, number == 5) for number in range(6)]
    buffer = PackingBuffer(130, 12, 16)
    rest = iter(waiting)
    for _ in range(stop):
        while len(buffer) < 16 and (document := next(rest, None)):
            buffer.add(document)
        buffer.take()
    again, rest = resumed(buffer, 16), list(rest)
    for ours, theirs in zip(emitted(buffer, rest, 16), emitted(again, rest, 16), strict=True):
        assert ours == theirs
        assert buffer.rows() == again.rows()


def test_pieces_of_a_document_leave_in_order_and_apart():
    buffer = PackingBuffer(100, 4, 20)
    address = SampleAddress(0, 0, 99)
    pieces = [PlannedDocument(address, 30, 0, 30 * number, number == 4) for number in range(5)]
    others = documents([(10 + number, 0) for number in range(40)])
    sequences = list(emitted(buffer, [*others[:10], *pieces, *others[10:]], 20))
    placed = [(number, d.start) for number, sequence in enumerate(sequences) for d in sequence if d.address == address]
    assert [start for _, start in placed] == [0, 30, 60, 90, 120]
    assert len({number for number, _ in placed}) == 5
    assert sum(map(len, sequences)) == 45


def test_of_equals_the_older_goes_first_a_piece_by_the_age_of_its_document():
    buffer = PackingBuffer(100, 4, 8)
    head, following = (PlannedDocument(SampleAddress(0, 0, 9), *piece) for piece in [(30, 0, 0, False), (40, 0, 30)])
    first, second, *equals = documents([(70, 0), (60, 0), (40, 0), (40, 0), (40, 0)])
    for document in (first, second, head, following, *equals):
        buffer.add(document)
    assert buffer.take() == (first, head)
    assert resumed(buffer, 8).take() == buffer.take() == (second, following)


def test_rows_do_not_grow_for_good():
    """A book of a hundred pieces makes room for itself, which goes with it."""
    buffer = PackingBuffer(100, 4, 8)
    book = [PlannedDocument(SampleAddress(0, 0, 0), 100, 0, 100 * number, number == 99) for number in range(100)]
    sequences = emitted(buffer, [*book, *documents([(20, 0)] * 200)], 8)
    for document in book:
        buffer.add(document)
    most = len(snapshot(buffer))
    for _ in range(220):
        next(sequences)
    assert most == 100
    assert len(snapshot(buffer)) == 8


@pytest.mark.parametrize("size", [(0, 0), (101, 0), (50, 5), (50, -1)])
def test_a_document_that_fits_no_sequence_is_refused(size):
    buffer = PackingBuffer(100, 4, 8)
    with pytest.raises(PackingError, match="fits no sequence"):
        buffer.add(PlannedDocument(SampleAddress(0, 0, 0), *size))


def test_a_snapshot_with_a_document_that_fits_no_sequence_is_refused():
    buffer = PackingBuffer(100, 4, 8)
    buffer.add(PlannedDocument(SampleAddress(0, 0, 0), 90, 0))
    with pytest.raises(PackingError, match="90 tokens and 0 tiles"):
        PackingBuffer(80, 4, 8, snapshot(buffer), buffer.added)


def interleaved(count, seed=0):
    rng = np.random.default_rng(seed)
    tiles = rng.integers(1, 7, count)
    tokens = np.minimum(tiles * 128 + rng.lognormal(np.log(650), 0.6, count).astype(int), 4096)
    return documents(zip(tokens.tolist(), tiles.tolist(), strict=True))


def test_hardly_a_token_stays_empty_and_ranks_have_like_tiles():
    tokens, tiles = np.zeros((8, 200)), np.zeros((8, 200))
    for rank in range(8):
        sequences = emitted(PackingBuffer(4096, 32, 256), interleaved(4000, seed=rank), 256)
        for step in range(200):
            sequence = next(sequences)
            tiles[rank, step] = sum(document.tiles for document in sequence)
            tokens[rank, step] = sum(document.tokens for document in sequence)
    assert tokens.mean() >= 0.99 * 4096
    assert (tiles.max(axis=0) / tiles.mean(axis=0)).mean() <= 1.25
    four = tiles.reshape(8, -1, 4).sum(axis=2)
    assert (four.max(axis=0) / four.mean(axis=0)).mean() <= 1.10
