"""From decoded documents to a packed sequence, and from sequences to the tensors of one forward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megablip.errors import PackingError
from megablip.records import (
    IGNORE_LABEL,
    DecodedDocument,
    MicroBatch,
    PackedSequence,
    PlannedSequence,
    Skip,
    VisualLayout,
)

if TYPE_CHECKING:
    import torch


def lay_out(
    planned: PlannedSequence,
    documents: Sequence[DecodedDocument],
    skipped: tuple[Skip, ...],
    tiles: np.ndarray,
    layout: VisualLayout,
) -> PackedSequence:
    """Lay the documents of a sequence end to end; there may be none.

    Args:
        tiles: uint8[N, 3, S, S], those of all the documents, in their order.

    Raises:
        PackingError: a document's visual tokens are not those of its tiles.
    """
    for document in documents:
        _check_slots(document, layout)
    lengths = np.array([len(document.input_ids) for document in documents], np.int32)
    starts = np.cumsum(lengths) - lengths
    labels = _joined([document.labels for document in documents], np.int32)
    labels[starts] = IGNORE_LABEL
    chosen = np.cumsum([document.preference == "chosen" for document in documents], dtype=np.int32) - 1
    in_pair = np.array([bool(document.preference) for document in documents], bool)
    return PackedSequence(
        lane=planned.lane,
        index=planned.index,
        input_ids=_joined([document.input_ids for document in documents], np.int32),
        labels=labels,
        doc_lens=lengths,
        source=np.array([document.source for document in documents], np.int32),
        pair=np.where(in_pair, chosen, -1).astype(np.int32),  # the rejected answer comes after its chosen one
        visual_positions=_joined(
            [document.visual_positions + start for document, start in zip(documents, starts, strict=True)], np.int32
        ),
        tiles=tiles,
        patch_mask=_joined([document.patch_mask for document in documents], bool, layout.patches_per_tile),
        grids=_joined([document.grids for document in documents], np.int32, 2),
        keys=tuple(document.key for document in documents),
        skipped=skipped,
        lane_state=planned.lane_state,
    )


class TileMemory:
    """Host memory for the tiles of micro-batches, used again once a micro-batch is gone.

    Touching fresh pages costs as much as the copy into them.

    Args:
        pinned: give pinned memory, from torch's own cache: only that knows when
            a copy to the device has ended.
    """

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._free: list[np.ndarray] = []

    def empty(self, count: int, side: int) -> torch.Tensor:
        """uint8[count, 3, side, side], of any content."""
        import torch

        size = count * 3 * side * side
        if self.pinned:
            return _as_tiles(torch.empty(size, dtype=torch.uint8, pin_memory=True), side)
        fitting = [number for number, block in enumerate(self._free) if size <= block.size <= 2 * size]
        block = self._free.pop(fitting[0]) if fitting else np.empty(size, np.uint8)
        view = block[:size]  # lives as long as the tensor's storage
        weakref.finalize(view, self._take_back, block)
        return _as_tiles(torch.from_numpy(view), side)

    def _take_back(self, block: np.ndarray) -> None:
        self._free = [*self._free[-3:], block]  # sizes vary: what did not fit again goes


def _as_tiles(memory: torch.Tensor, side: int) -> torch.Tensor:
    """As images.as_tiles."""
    return memory.view(-1, side, side, 3).permute(0, 3, 1, 2)


def collate(
    sequences: Sequence[PackedSequence],
    layout: VisualLayout,
    memory: TileMemory | None = None,
    *,
    keep_tiles: bool = False,
) -> MicroBatch:
    """Lay sequences end to end.

    Without any document there is a dummy one of one token that has no label;
    without any image a dummy tile, with `dummy` set and no visual token
    (its `tile_to_image` is -1).
    """
    import torch  # here: importing megablip.data must stay cheap for the processes that have no tensors

    memory = memory or TileMemory()
    lengths = np.array([sequence.tokens for sequence in sequences], np.int64)
    starts = np.cumsum(lengths) - lengths
    doc_lens = [int(length) for sequence in sequences for length in sequence.doc_lens]
    input_ids = _joined([sequence.input_ids for sequence in sequences], np.int64)
    labels = _joined([sequence.labels for sequence in sequences], np.int64)
    source = _joined([sequence.source for sequence in sequences], np.int32)
    pairs = np.array([sequence.pair.max(initial=-1) + 1 for sequence in sequences], np.int32)
    first_pair = np.cumsum(pairs) - pairs
    pair = _joined(
        [
            np.where(sequence.pair < 0, -1, sequence.pair + first)
            for sequence, first in zip(sequences, first_pair, strict=True)
        ],
        np.int32,
    )
    keys = [key for sequence in sequences for key in sequence.keys]
    if not doc_lens:
        doc_lens, keys = [1], [""]
        input_ids, labels = np.zeros(1, np.int64), np.full(1, IGNORE_LABEL, np.int64)
        source = pair = np.full(1, -1, np.int32)
    cu_seqlens = np.cumsum([0, *doc_lens])
    visual = [sequence.visual_positions + start for sequence, start in zip(sequences, starts, strict=True)]
    grids = _joined([sequence.grids for sequence in sequences], np.int32, 2)
    patch_mask = _joined([sequence.patch_mask for sequence in sequences], bool, layout.patches_per_tile)
    tile_to_image = np.repeat(np.arange(len(grids)), 1 + grids.prod(axis=1))
    dummy = not len(patch_mask)
    if dummy:
        patch_mask, tile_to_image = np.ones((1, layout.patches_per_tile), bool), np.array([-1])

    with_tiles = [sequence.tiles for sequence in sequences if len(sequence.tiles)]
    if keep_tiles and len(with_tiles) == 1 and not memory.pinned:
        tiles = torch.from_numpy(with_tiles[0])
    else:
        tiles = memory.empty(len(patch_mask), layout.tile_size)
        if dummy:
            tiles.zero_()
        else:
            np.concatenate(with_tiles, out=tiles.numpy())

    def tensor(array: np.ndarray, dtype: type) -> torch.Tensor:
        made = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
        return made.pin_memory() if memory.pinned else made

    return MicroBatch(
        input_ids=tensor(input_ids, np.int64),
        labels=tensor(labels, np.int64),
        position_ids=tensor(np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], doc_lens), np.int64),
        cu_seqlens=tensor(cu_seqlens, np.int32),
        doc_lens=doc_lens,
        max_seqlen=max(doc_lens),
        source=tensor(source, np.int32),
        pair=tensor(pair, np.int32),
        tiles=tiles,
        patch_mask=tensor(patch_mask, np.bool_),
        tile_to_image=tensor(tile_to_image, np.int32),
        grid=tensor(grids, np.int32),
        visual_token_index=tensor(_joined(visual, np.int64), np.int64),
        keys=keys,
        dummy=dummy,
    )


def _joined(arrays: list[np.ndarray], dtype: type, *width: int) -> np.ndarray:
    """One array of `dtype`, of the right shape also where there is nothing to join."""
    return np.concatenate([np.zeros((0, *width), dtype), *arrays]).astype(dtype, copy=False)


def _check_slots(document: DecodedDocument, layout: VisualLayout) -> None:
    slots, tiles = len(document.visual_positions), len(document.patch_mask)
    by_grid = sum(1 + columns * rows for columns, rows in document.grids.tolist())
    wanted = sum(map(layout.visual_tokens, document.grids.tolist()))
    if slots != wanted or by_grid != tiles:
        raise PackingError(
            f"{slots} visual tokens and {tiles} tiles, where the images' grids make {wanted} and {by_grid}",
            where=f"source {document.source}, key {document.key}",
            remedy="this is a fault of the encoder: report it with the sample",
        )
