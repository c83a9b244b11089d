"""A tiny model and documents for each kind of sampler."""

from __future__ import annotations

import torch

from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.model.samplers import SAMPLERS
from megablip.records import IGNORE_LABEL
from tests.model.tiny import IMAGE_ID, Doc, tiny_model

USER, END, ASSISTANT = 81, 82, 83
_PERCEIVER = {"depth": 2, "heads": 2, "dim_head": 8, "num_latents": 3, "ff_mult": 2}
SETTINGS = {
    "perceiver": _PERCEIVER,
    "fixed": _PERCEIVER,
    "instruct": _PERCEIVER,
    "qformer": {"depth": 3, "heads": 2, "dim_head": 8, "num_queries": 3, "ff_mult": 2, "cross_attention_every": 2},
    "mlp": {},
}
KINDS = sorted(SAMPLERS)
INSTRUCTED = [kind for kind in KINDS if SAMPLERS[kind].reads_instruction]


def variant_model(kind: str, seed: int = 0, **config) -> Blip3ForConditionalGeneration:
    sampler = {"kind": kind} | SETTINGS[kind]
    model = tiny_model(seed, sampler=sampler, user_turn_ids=[USER], turn_end_id=END, **config)
    if kind == "qformer":  # its small initial weights hardly let an image through
        for parameter in model.sampler.qformer.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def chat_doc(
    model: Blip3ForConditionalGeneration, grids: list[tuple[int, int]], seed: int, question: int = 5, answer: int = 6
) -> Doc:
    """bos <user> images question <end> <assistant> answer <end>: the answer and its end have labels."""
    generator = torch.Generator().manual_seed(seed)

    def text(tokens: int) -> list[int]:
        return torch.randint(3, 80, (tokens,), generator=generator).tolist()

    layout = model.config.layout
    ids, images = [1, USER], []
    for grid in grids:
        images.append(len(ids))
        ids += [IMAGE_ID] * layout.visual_tokens(grid)
    ids += [*text(question), END, ASSISTANT]
    trained = len(ids)
    ids += [*text(answer), END]
    labels = torch.tensor(ids)
    labels[:trained] = IGNORE_LABEL
    tiles = sum(map(layout.tiles, grids))
    mask = torch.rand(tiles, layout.patches_per_tile, generator=generator) < 0.8
    if tiles > 1:
        mask[-1] = False  # a crop of padding only
    pixels = torch.randint(0, 256, (tiles, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Doc(torch.tensor(ids), labels, grids, pixels, mask)


def prompt_of(doc: Doc) -> Doc:
    """The document up to its answer."""
    length = int((doc.input_ids == ASSISTANT).nonzero()[0]) + 1
    return Doc(doc.input_ids[:length], doc.labels[:length], doc.grids, doc.tiles, doc.patch_mask)
