"""Models with random weights and packed micro-batches, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Phi3Config, PreTrainedModel, SiglipVisionConfig

from megablip.config import Config, parse_config
from megablip.data.collate import TileMemory, collate, lay_out
from megablip.doctor.result import Place
from megablip.engine.build import build_unfilled
from megablip.model.blip3 import Blip3Config
from megablip.model.vision import build_tower, freeze
from megablip.records import IGNORE_LABEL, DecodedDocument, MicroBatch, PlannedSequence

IMAGE_ID, PAD_ID = 4, 3
_FIRST_TEXT_ID = 10


def model_config(decoder: dict[str, Any], vision: dict[str, Any], sampler: dict[str, int]) -> Blip3Config:
    """A Phi-3 decoder, a SigLIP tower and a resampler; what is not given is as released."""
    ids = {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": 2}
    return Blip3Config(
        text_config=Phi3Config(**ids | decoder),
        vision_config=SiglipVisionConfig(**{"vision_use_head": False} | vision),
        sampler=sampler,
        image_token_id=IMAGE_ID,
        pad_token_id=PAD_ID,
    )


def micro_batch(
    config: Blip3Config,
    documents: Sequence[tuple[int, tuple[tuple[int, int], ...]]],
    seed: int,
    *,
    masked_share: float = 0.5,
    pinned: bool = False,
) -> MicroBatch:
    """Documents of random text and pixels, through the loader's own collate.

    Args:
        documents: (text tokens, grids of the images before the text) of each.
        masked_share: of the text tokens, that have no label.
        pinned: in pinned memory, as the loader gives them for a GPU.
    """
    rng, layout = np.random.default_rng(seed), config.layout
    decoded = []
    for number, (text_tokens, grids) in enumerate(documents):
        tiles = sum(layout.tiles(grid) for grid in grids)
        visual = np.arange(sum(map(layout.visual_tokens, grids)))
        text = rng.integers(_FIRST_TEXT_ID, config.text_config.vocab_size, text_tokens)
        labels = np.where(rng.random(text_tokens) < masked_share, IGNORE_LABEL, text)
        decoded.append(
            DecodedDocument(
                input_ids=np.append(np.full_like(visual, IMAGE_ID), text),
                labels=np.append(np.full_like(visual, IGNORE_LABEL), labels),
                visual_positions=visual,
                tiles=rng.integers(0, 256, (tiles, 3, layout.tile_size, layout.tile_size), np.uint8),
                patch_mask=rng.random((tiles, layout.patches_per_tile)) < 0.9,
                grids=np.array(grids, np.int32).reshape(-1, 2),
                source=0,
                key=str(number),
            )
        )
    planned = PlannedSequence(0, 0, (), np.zeros(0, np.int64))
    pixels = np.concatenate([document.tiles for document in decoded])
    return collate([lay_out(planned, decoded, (), pixels, layout)], layout, TileMemory(pinned))


def random_tower(config: Blip3Config, place: Place) -> PreTrainedModel:
    """The frozen tower in bf16, on the device, as the trainer builds it."""
    tower = build_unfilled(lambda: build_tower(config.vision_config, pooling_head=False), torch.bfloat16, place.device)
    fill(tower, seed=1)
    return freeze(tower.to(place.device))


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Random weights where the parameters lie: norms one, biases zero, all else normal with deviation 0.02."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        generator = generators.setdefault(parameter.device, torch.Generator(parameter.device).manual_seed(seed))
        parameter.copy_(random_values(name, parameter.shape, parameter.dtype, generator))


def random_values(
    name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Values for one parameter, on the generator's device."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=generator.device)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype, device=generator.device)
    deviation = 1.0 if name.endswith("latents") else 0.02
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(0, deviation, generator=generator)


def run_config(folder: Path, **sections: Any) -> Config:
    """A recipe; `sections` replace those of a run that needs no data."""
    source = {"name": "none", "shards": "none.tar", "schema": "text", "weight": 1}
    recipe = {
        "stage": "pretrain",
        "run_dir": str(folder / "run"),
        "duration": "1 steps",
        "model": {"path": str(folder / "start")},
        "data": {"sources": [source], "sequence_length": 1, "max_tiles": 1},
        "batch": {"lanes": 1},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config(recipe | sections, where="doctor")
