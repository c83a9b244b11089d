"""From packed sequences to the tensors of one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megablip.errors import PackingError
from megablip.records import IGNORE_LABEL, DecodedDocument, MicroBatch, PackedSequence, VisualLayout

if TYPE_CHECKING:
    from torch import Tensor


def collate(sequences: list[PackedSequence], layout: VisualLayout) -> MicroBatch:
    """Lay the documents of sequences end to end.

    Without any document there is a dummy one of one token that has no label;
    without any image a dummy tile, with `dummy` set and no visual token
    (its `tile_to_image` is -1).

    Raises:
        PackingError: a document's visual tokens are not those of its tiles.
    """
    import torch  # here: importing megablip.data must stay cheap for the processes that have no tensors

    documents = [document for sequence in sequences for document in sequence.documents]
    for document in documents:
        _check_slots(document, layout)
    documents = documents or [_dummy_document(layout)]
    tiles = [len(document.tiles) for document in documents]
    dummy = not sum(tiles)
    side, patches = layout.tile_size, layout.patches_per_tile
    doc_lens = [len(document.input_ids) for document in documents]
    cu_seqlens = np.cumsum([0, *doc_lens])
    starts = cu_seqlens[:-1]
    labels = np.concatenate([document.labels for document in documents]).astype(np.int64)
    labels[starts] = IGNORE_LABEL  # nothing before a document's first token predicts it
    grids = np.concatenate([document.grids for document in documents])
    visual = [document.visual_positions + start for document, start in zip(documents, starts, strict=True)]

    def tensor(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))

    return MicroBatch(
        input_ids=tensor(np.concatenate([document.input_ids for document in documents]), np.int64),
        labels=tensor(labels, np.int64),
        position_ids=tensor(np.arange(cu_seqlens[-1]) - np.repeat(starts, doc_lens), np.int64),
        cu_seqlens=tensor(cu_seqlens, np.int32),
        doc_lens=doc_lens,
        max_seqlen=max(doc_lens),
        source=tensor(np.array([document.source for document in documents]), np.int32),
        pair=tensor(np.full(len(documents), -1), np.int32),
        tiles=tensor(
            np.zeros((1, 3, side, side)) if dummy else np.concatenate([document.tiles for document in documents]),
            np.uint8,
        ),
        patch_mask=tensor(
            np.ones((1, patches)) if dummy else np.concatenate([document.patch_mask for document in documents]),
            np.bool_,
        ),
        tile_to_image=tensor(
            np.array([-1]) if dummy else np.repeat(np.arange(len(grids)), 1 + grids.prod(axis=1)), np.int32
        ),
        grid=tensor(grids, np.int32),
        visual_token_index=tensor(np.concatenate(visual), np.int64),
        keys=[document.key for document in documents],
        dummy=dummy,
    )


def _check_slots(document: DecodedDocument, layout: VisualLayout) -> None:
    slots, tiles = len(document.visual_positions), len(document.tiles)
    by_grid = int((1 + document.grids.prod(axis=1)).sum())
    if slots != tiles * layout.tokens_per_tile or by_grid != tiles:
        raise PackingError(
            f"{slots} visual tokens for {tiles} tiles of {layout.tokens_per_tile} tokens each ({by_grid} by the grids)",
            where=f"source {document.source}, key {document.key}",
            remedy="this is a fault of the encoder: report it with the sample",
        )


def _dummy_document(layout: VisualLayout) -> DecodedDocument:
    return DecodedDocument(
        input_ids=np.zeros(1, np.int32),
        labels=np.full(1, IGNORE_LABEL, np.int32),
        visual_positions=np.zeros(0, np.int32),
        tiles=np.zeros((0, 3, layout.tile_size, layout.tile_size), np.uint8),
        patch_mask=np.zeros((0, layout.patches_per_tile), bool),
        grids=np.zeros((0, 2), np.int32),
        source=-1,
        key="",
    )
