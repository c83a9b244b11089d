import numpy as np
import pytest
import torch

from megablip.data.collate import TileMemory, collate, lay_out
from megablip.errors import PackingError
from megablip.records import DecodedDocument, PlannedSequence, VisualLayout

LAYOUT = VisualLayout(tile_size=16, patch_size=8, tokens_per_tile=3, grids=((1, 1), (2, 1)))


def document(key, tokens, grids=(), first_label=7, preference=""):
    tiles = sum(1 + columns * rows for columns, rows in grids)
    slots = tiles * LAYOUT.tokens_per_tile
    labels = np.arange(tokens, dtype=np.int32)
    labels[0] = first_label
    return DecodedDocument(
        input_ids=np.arange(100, 100 + tokens, dtype=np.int32),
        labels=labels,
        visual_positions=np.arange(2, 2 + slots, dtype=np.int32),
        tiles=np.full((tiles, 3, 16, 16), tokens, np.uint8),
        patch_mask=np.ones((tiles, LAYOUT.patches_per_tile), bool),
        grids=np.array(grids, np.int32).reshape(-1, 2),
        source=1,
        key=key,
        preference=preference,
    )


def sequence(*documents):
    tiles = np.concatenate([np.zeros((0, 3, 16, 16), np.uint8), *(document.tiles for document in documents)])
    return lay_out(PlannedSequence(0, 0, (), np.zeros(0, np.int64)), documents, (), tiles, LAYOUT)


def test_collate_lays_documents_end_to_end():
    batch = collate(
        [sequence(document("a", 4), document("b", 20, [(2, 1)])), sequence(document("c", 10, [(1, 1)]))], LAYOUT
    )
    assert batch.keys == ["a", "b", "c"]
    assert batch.doc_lens == [4, 20, 10]
    assert batch.max_seqlen == 20
    assert batch.cu_seqlens.tolist() == [0, 4, 24, 34]
    assert batch.position_ids.tolist() == [*range(4), *range(20), *range(10)]
    assert batch.input_ids.tolist() == [*range(100, 104), *range(100, 120), *range(100, 110)]
    assert batch.labels[[0, 4, 24]].tolist() == [-100] * 3
    assert batch.labels[[1, 5, 25]].tolist() == [1] * 3
    assert batch.valid_labels == 31
    assert batch.visual_token_index.tolist() == [*range(6, 15), *range(26, 32)]
    assert batch.tile_to_image.tolist() == [0, 0, 0, 1, 1]
    assert batch.grid.tolist() == [[2, 1], [1, 1]]
    assert batch.tiles[:, 0, 0, 0].tolist() == [20] * 3 + [10] * 2
    assert batch.pair.tolist() == [-1] * 3
    assert not batch.dummy
    types = {name: getattr(batch, name).dtype for name in ("input_ids", "cu_seqlens", "source", "tiles", "patch_mask")}
    assert list(types.values()) == [torch.int64, torch.int32, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize(
    ("documents", "pair"),
    [
        (["a.chosen", "a.rejected"], [0, 0]),
        (["a.", "b.chosen", "b.rejected", "c.chosen", "c.rejected", "d."], [-1, 0, 0, 1, 1, -1]),
    ],
)
def test_pairs_are_numbered(documents, pair):
    laid = [document(key, 4, preference=preference) for key, preference in (name.split(".") for name in documents)]
    batch = collate([sequence(*laid)], LAYOUT)
    assert batch.pair.tolist() == pair
    assert batch.pair.dtype == torch.int32


@pytest.mark.parametrize("sequences", [[], [sequence()], [sequence(document("a", 4))]])
def test_a_micro_batch_without_images_has_a_dummy_tile(sequences):
    batch = collate(sequences, LAYOUT)
    assert batch.dummy
    assert batch.tiles.shape == (1, 3, 16, 16)
    assert not batch.tiles.any()
    assert batch.patch_mask.shape == (1, 4)
    assert batch.patch_mask.all()
    assert batch.visual_token_index.shape == (0,)
    assert batch.grid.shape == (0, 2)
    if not any(s.tokens for s in sequences):
        assert batch.input_ids.tolist() == [0]
        assert batch.labels.tolist() == [-100]
        assert batch.source.tolist() == [-1]
        assert batch.cu_seqlens.tolist() == [0, 1]
        assert batch.keys == [""]
        assert batch.valid_labels == 0


def test_visual_tokens_that_do_not_match_the_tiles_are_an_error():
    good = document("k9", 30, [(1, 1)])
    for change in (
        {"visual_positions": good.visual_positions[:-1]},
        {"grids": np.array([[2, 1]], np.int32)},
    ):
        fields = {name: getattr(good, name) for name in DecodedDocument.__slots__} | change
        with pytest.raises(PackingError, match="visual tokens") as caught:
            sequence(DecodedDocument(**fields))
        assert "k9" in caught.value.where


def test_pairs_are_numbered_through_the_micro_batch():
    def pair(key):
        return [document(key, 5, preference="chosen"), document(key, 6, preference="rejected")]

    batch = collate([sequence(document("a", 4), *pair("b"), *pair("c")), sequence(), sequence(*pair("d"))], LAYOUT)
    assert batch.keys == ["a", "b", "b", "c", "c", "d", "d"]
    assert batch.pair.tolist() == [-1, 0, 0, 1, 1, 2, 2]


def test_tile_memory_is_used_again_once_its_tensor_and_all_views_are_gone():
    memory = TileMemory()
    first = memory.empty(2, 16)
    place, view = first.data_ptr(), first[1]
    del first
    second = memory.empty(2, 16)
    assert second.data_ptr() != place
    del view
    assert memory.empty(2, 16).data_ptr() == place


def test_tiles_of_a_lone_sequence_may_be_kept_where_they_are():
    one, other = sequence(document("a", 10, [(1, 1)])), sequence(document("b", 4))
    copied, kept = (collate([one], LAYOUT, keep_tiles=keep) for keep in (False, True))
    assert kept.tiles.data_ptr() == one.tiles.ctypes.data != copied.tiles.data_ptr()
    for name in ("input_ids", "tiles", "patch_mask", "tile_to_image", "visual_token_index"):
        assert getattr(kept, name).tolist() == getattr(copied, name).tolist()
    assert collate([other, one], LAYOUT, keep_tiles=True).tiles.data_ptr() == one.tiles.ctypes.data
    two = collate([one, sequence(document("c", 10, [(1, 1)]))], LAYOUT, keep_tiles=True)
    assert two.tiles.shape == (4, 3, 16, 16)
    assert collate([other], LAYOUT, keep_tiles=True).dummy
