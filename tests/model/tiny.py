"""A model and packs small enough for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Phi3Config, PreTrainedConfig, SiglipVisionConfig

from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.vision import encode_tiles
from megablip.records import IGNORE_LABEL, MicroBatch

IMAGE_ID, PAD_ID, VOCABULARY = 90, 89, 96


def tiny_config(
    window: int | None = None,
    vocabulary: int = VOCABULARY,
    tied: bool = False,
    text: PreTrainedConfig | None = None,
    vision: PreTrainedConfig | None = None,
    **overrides,
) -> Blip3Config:
    text = text or Phi3Config(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=window,
        pad_token_id=PAD_ID,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # far from uniform predictions, so that mistakes show
    )
    vision = vision or SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    settings = {
        "sampler": {"depth": 2, "heads": 2, "dim_head": 8, "num_latents": 3, "ff_mult": 2},
        "grids": [(1, 2), (2, 1), (2, 2)],
        "image_token_id": IMAGE_ID,
        "pad_token_id": PAD_ID,
    }
    return Blip3Config(text_config=text, vision_config=vision, **settings | overrides)


def tiny_model(seed: int = 0, train_tower: bool = False, **config) -> Blip3ForConditionalGeneration:
    torch.manual_seed(seed)
    model = Blip3ForConditionalGeneration(tiny_config(**config), train_tower=train_tower)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.eval()


@dataclass
class Doc:
    """One document: ids, labels, and its images' grids and tiles."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    grids: list[tuple[int, int]]
    tiles: torch.Tensor
    patch_mask: torch.Tensor


def make_doc(text_tokens: int, grids: list[tuple[int, int]], seed: int, tokens_per_tile: int = 3) -> Doc:
    """Random text with one run of visual tokens for each image, somewhere inside."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (text_tokens,), generator=generator).tolist()
    cuts = torch.randint(1, text_tokens, (len(grids),), generator=generator).sort(descending=True).values.tolist()
    for cut, (columns, rows) in zip(cuts, reversed(grids), strict=True):
        ids[cut:cut] = [IMAGE_ID] * ((1 + columns * rows) * tokens_per_tile)
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[input_ids == IMAGE_ID] = IGNORE_LABEL
    labels[torch.rand(len(ids), generator=generator) < 0.3] = IGNORE_LABEL
    labels[0] = IGNORE_LABEL
    tiles = sum(1 + columns * rows for columns, rows in grids)
    mask = torch.rand(tiles, 16, generator=generator) < 0.8
    pixels = torch.randint(0, 256, (tiles, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Doc(input_ids, labels, grids, pixels, mask)


def pack(docs: list[Doc]) -> MicroBatch:
    lengths = [len(doc.input_ids) for doc in docs]
    input_ids = torch.cat([doc.input_ids for doc in docs])
    tiles = torch.cat([doc.tiles for doc in docs])
    mask = torch.cat([doc.patch_mask for doc in docs])
    grids = [grid for doc in docs for grid in doc.grids]
    dummy = len(tiles) == 0
    if dummy:
        tiles, mask = (
            torch.zeros(1, *tiles.shape[1:], dtype=torch.uint8),
            torch.ones(1, mask.shape[1], dtype=torch.bool),
        )
    per_image = torch.tensor([1 + columns * rows for columns, rows in grids], dtype=torch.int64)
    return MicroBatch(
        input_ids=input_ids,
        labels=torch.cat([doc.labels for doc in docs]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        doc_lens=lengths,
        max_seqlen=max(lengths),
        source=torch.zeros(len(docs), dtype=torch.int32),
        pair=torch.full((len(docs),), -1, dtype=torch.int32),
        tiles=tiles,
        patch_mask=mask,
        tile_to_image=torch.arange(len(grids)).repeat_interleave(per_image).to(torch.int32),
        grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 2),
        visual_token_index=(input_ids == IMAGE_ID).nonzero().squeeze(1),
        keys=[str(number) for number in range(len(docs))],
        dummy=dummy,
    )


def docs() -> list[Doc]:
    """Two with images and two without."""
    return [
        make_doc(12, [], seed=1),
        make_doc(20, [(2, 1)], seed=2),
        make_doc(9, [(1, 2), (2, 2)], seed=3),
        make_doc(31, [], seed=4),
    ]


def prompts() -> list[Doc]:
    """With no image, one and three."""
    return [
        make_doc(7, [], seed=5),
        make_doc(11, [(2, 1)], seed=6),
        make_doc(5, [(1, 2), (2, 2), (2, 1)], seed=7),
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def left_padded(rows: list[Doc]) -> dict[str, torch.Tensor]:
    """What generate takes, as the processor makes it."""
    length = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), length), PAD_ID)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row.input_ids) :] = row.input_ids
        mask[number, length - len(row.input_ids) :] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "tiles": torch.cat([row.tiles for row in rows]),
        "patch_mask": torch.cat([row.patch_mask for row in rows]),
        "grids": torch.tensor([grid for row in rows for grid in row.grids], dtype=torch.int32).reshape(-1, 2),
    }


def features_of(model: Blip3ForConditionalGeneration, batch: MicroBatch) -> torch.Tensor:
    return encode_tiles(model.vision_tower, batch.tiles)
