from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.data.split import cut

TEXT = st.tuples(st.integers(0, 120), st.just(0))
IMAGE = st.integers(1, 6).map(lambda tiles: (tiles * 9, tiles))


@given(st.lists(TEXT | IMAGE, min_size=1, max_size=30), st.integers(30, 100), st.integers(3, 8))
def test_pieces_lie_end_to_end_and_keep_the_budgets(segments, max_tokens, max_tiles):
    pieces = cut(segments, max_tokens, max_tiles)
    if any(tiles > max_tiles or (tiles and tokens > max_tokens) for tokens, tiles in segments):
        assert pieces == []
        return
    total = sum(tokens for tokens, _ in segments)
    assert sum(piece.tokens for piece in pieces) == total
    assert sum(piece.tiles for piece in pieces) == sum(tiles for _, tiles in segments)
    assert all(0 < piece.tokens <= max_tokens and piece.tiles <= max_tiles for piece in pieces)
    assert all(a.start + a.tokens == b.start for a, b in pairwise(pieces))
    assert not pieces or pieces[0].start == 0
    start = 0
    edges = {piece.start for piece in pieces}
    for tokens, tiles in segments:
        inside = [edge for edge in edges if start < edge < start + tokens]
        assert not inside or (not tiles and tokens > max_tokens)
        held = sum(piece.tiles for piece in pieces if piece.start <= start < piece.start + piece.tokens)
        assert held >= tiles
        start += tokens


@given(st.lists(TEXT | IMAGE, min_size=1, max_size=10))
def test_what_fits_stays_whole(segments):
    tokens, tiles = (sum(column) for column in zip(*segments, strict=True))
    pieces = cut(segments, max(tokens, 1), max(tiles, 6))
    assert pieces == ([(0, tokens, tiles)] if tokens else [])


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([(60, 0), (60, 0)], [(0, 60, 0), (60, 60, 0)]),  # between segments
        ([(250, 0)], [(0, 100, 0), (100, 100, 0), (200, 50, 0)]),  # at a token
        ([(40, 0), (150, 0)], [(0, 100, 0), (100, 90, 0)]),  # a text that must be cut fills what is open
        ([(200, 0)], [(0, 100, 0), (100, 100, 0)]),  # no empty piece
        ([(70, 0), (40, 2), (50, 0)], [(0, 70, 0), (70, 90, 2)]),  # an image moves to the next piece
        ([(10, 2), (10, 2), (10, 1)], [(0, 20, 4), (20, 10, 1)]),  # tiles run out first
        ([(10, 0), (110, 2), (10, 0)], []),  # an image alone has too many tokens
        ([(10, 5), (10, 0)], []),  # or too many tiles
    ],
)
def test_where_a_document_is_cut(segments, expected):
    assert cut(segments, max_tokens=100, max_tiles=4) == expected
