"""Cutting a document that is longer than a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """`tokens` tokens of a document from token `start` on, with `tiles` tiles among them."""

    start: int
    tokens: int
    tiles: int


def cut(segments: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int) -> list[Piece]:
    """Pieces that lie end to end, cover the document, and each fit into a sequence.

    Segments are kept whole, except a text that no sequence holds: that one
    fills each piece to the last token.

    Args:
        segments: (tokens, tiles) of each, in order; one with a tile is an image.
        max_tokens, max_tiles: of a sequence.

    Returns:
        The pieces, in order; none if an image alone is too large, as images are never cut.
    """
    if any(tiles and (tokens > max_tokens or tiles > max_tiles) for tokens, tiles in segments):
        return []
    pieces, start, held_tokens, held_tiles = [], 0, 0, 0

    def close() -> None:
        nonlocal start, held_tokens, held_tiles
        if held_tokens:
            pieces.append(Piece(start, held_tokens, held_tiles))
        start, held_tokens, held_tiles = start + held_tokens, 0, 0

    for tokens, tiles in segments:
        if tokens > max_tokens:
            while tokens > max_tokens - held_tokens:
                tokens -= max_tokens - held_tokens
                held_tokens = max_tokens
                close()
        elif held_tokens + tokens > max_tokens or held_tiles + tiles > max_tiles:
            close()
        held_tokens += tokens
        held_tiles += tiles
    close()
    return pieces
