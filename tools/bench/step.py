"""One training micro-batch at the demo's size: forward and backward in bf16.

Both sides are the same model with the same weights, sampler included, on the same
packed documents; vision features are given.  The rival's decoder takes
transformers' own packed path: SDPA, documents told apart by restarted position
ids, logits of all rows, and transformers' loss.  The gradients are compared as well
as the loss, which with random weights hardly tells a wrong mask from the right one.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig

from megablip.data.collate import collate, lay_out
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.records import IGNORE_LABEL, DecodedDocument, MicroBatch, PlannedSequence, VisualLayout
from tools.bench.core import Rival, Row, median_seconds
from tools.tower import CONFIG as TOWER

SETTINGS = Path(__file__).parents[2] / "megablip" / "recipes" / "mini" / "model.yaml"
VOCABULARY, IMAGE_ID, FIRST_TEXT_ID = 400, 4, 10
DOCUMENTS, GRID, TEXT_TOKENS = 24, (2, 1), (8, 23)  # three tiles of ten tokens each, and text: about 45 tokens


def rows() -> list[Row]:
    ours = build_model()
    theirs = copy.deepcopy(ours)
    theirs.decoder.set_attn_implementation("sdpa")
    batch = make_batch(ours.config.layout)
    features = torch.randn(*batch.patch_mask.shape, TOWER["hidden_size"], dtype=torch.bfloat16)
    sides = {
        "ours": lambda: step(ours, ours(packed=batch, vision_features=features).loss / batch.valid_labels),
        "theirs": lambda: step(theirs, transformers_loss(theirs, batch, features)),
    }
    losses = [side() for side in sides.values()]
    seconds = median_seconds(sides, repeats=15)
    rival = Rival("transformers", seconds["theirs"] * 1e3)
    return [
        Row("time", seconds["ours"] * 1e3, "ms", "lower", goal=2.0, rival=rival),
        Row("loss_error", relative_error(*losses), "", "lower", goal=1e-4),
        # Rounding to bf16 alone puts either side 0.009 off the gradient in float32.
        Row("gradient_error", relative_error(gradients(ours), gradients(theirs)), "", "lower", goal=0.02),
    ]


def build_model() -> Blip3ForConditionalGeneration:
    settings = yaml.safe_load(SETTINGS.read_text())
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Blip3Config(
        text_config=AutoConfig.for_model(**settings["decoder"], **ids, vocab_size=VOCABULARY),
        vision_config=AutoConfig.for_model("siglip_vision_model", **TOWER),
        sampler=settings["sampler"],
        grids=settings["grids"],
        image_token_id=IMAGE_ID,
    )
    torch.manual_seed(0)
    model = Blip3ForConditionalGeneration(config, with_vision_tower=False)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def make_batch(layout: VisualLayout) -> MicroBatch:
    """Documents of one image and a text that is trained on, of lengths that differ."""
    rng = np.random.default_rng(0)
    tiles = layout.tiles(GRID)
    visual = np.arange(tiles * layout.tokens_per_tile)
    documents = []
    for number in range(DOCUMENTS):
        text = rng.integers(FIRST_TEXT_ID, VOCABULARY, rng.integers(*TEXT_TOKENS))
        document = DecodedDocument(
            input_ids=np.append(np.full_like(visual, IMAGE_ID), text),
            labels=np.append(np.full_like(visual, IGNORE_LABEL), text),
            visual_positions=visual,
            tiles=np.zeros((tiles, 3, layout.tile_size, layout.tile_size), np.uint8),
            patch_mask=np.ones((tiles, layout.patches_per_tile), bool),
            grids=np.array([GRID]),
            source=0,
            key=str(number),
        )
        documents.append(document)
    planned = PlannedSequence(0, 0, (), np.zeros(0, np.int64))
    pixels = np.concatenate([document.tiles for document in documents])
    return collate([lay_out(planned, documents, (), pixels, layout)], layout)


def step(model: Blip3ForConditionalGeneration, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return loss.detach()


def transformers_loss(model: Blip3ForConditionalGeneration, batch: MicroBatch, features: Tensor) -> Tensor:
    visual = model.sampler(features, batch.patch_mask).flatten(0, 1)
    embeds = model.get_input_embeddings()(batch.input_ids).index_copy(0, batch.visual_token_index, visual)
    positions, labels = batch.position_ids[None], batch.labels[None]
    return model.decoder(inputs_embeds=embeds[None], position_ids=positions, labels=labels, use_cache=False).loss


def gradients(model: Blip3ForConditionalGeneration) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
