"""The full-size recipe's model and micro-batch, and what fits on one device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from megablip.config import Config, load_config
from megablip.data.images import NO_GRID
from megablip.doctor.result import Place, Result
from megablip.doctor.synthetic import micro_batch, model_config
from megablip.engine.build import build_unfilled
from megablip.metrics.flops import ModelFlops, peak_flops
from megablip.metrics.sums import attended_pairs
from megablip.model.blip3 import Blip3Config
from megablip.model.vision import build_tower
from megablip.records import MicroBatch
from megablip.train import build_trained

# Phi-3-mini-4k, SigLIP-so400m-patch14-384 and the released sampler.
_FULL: dict[str, dict[str, Any]] = {
    "decoder": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": 2047},
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
               "image_size": 384, "patch_size": 14},
    "sampler": {},
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "decoder": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 256, "sliding_window": 63},
    "vision": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14},
    "sampler": {"depth": 1, "heads": 2, "dim_head": 16, "num_latents": 4, "ff_mult": 2},
}  # fmt: skip

STATE_BYTES = {
    "working weights (bf16)": 2,
    "masters (fp32)": 4,
    "Adam's moments (fp32)": 8,
    "gradients (fp32)": 4,
    # DeepSpeed looks for infinities in all of a rank's gradients at once: their magnitudes, and the answers.
    "the step's look for infinities": 5,
}
"""Bytes a trained parameter takes under ZeRO-3 on one rank, at most."""

# For activations, gathered weights (stage3_max_live_parameters) and the CUDA context;
# and the share of a device's memory that can be filled before it falls into pieces.
_REST_BYTES, _USABLE_SHARE = 16e9, 0.9


@dataclass(frozen=True)
class FullSize:
    """What is measured: the recipe's model, as far as a device holds it.

    Attributes:
        recipe: of pre-training.
        sequence_tokens: of each of the micro-batch's sequences.
        parameters: trained ones; `layer_parameters` of them in each of the decoder's layers.
        tower_bytes: of the frozen tower, in bf16.
        device_bytes: memory of the device.
        without_storage: the trained part of the model, on the meta device.
    """

    recipe: Config
    model: Blip3Config
    sequence_tokens: int
    parameters: int
    layer_parameters: int
    tower_bytes: int
    device_bytes: int
    without_storage: nn.Module

    @classmethod
    def of(cls, place: Place) -> FullSize:
        recipe = load_config(Path(str(files("megablip") / "recipes" / "pretrain.yaml")))
        model = model_config(**(_SMALL if place.small else _FULL))
        model.grids = []  # as the recipe has it: the base tile alone
        trained, tower = (
            build_unfilled(build, torch.bfloat16, torch.device("meta"))
            for build in (partial(build_trained, model, recipe), lambda: build_tower(model.vision_config, False))
        )
        return cls(
            recipe=recipe,
            model=model,
            sequence_tokens=256 if place.small else recipe.data.sequence_length,
            parameters=_count(trained),
            layer_parameters=_count(trained.decoder.base_model.layers[0]),
            tower_bytes=2 * _count(tower),
            device_bytes=torch.cuda.get_device_properties(place.device).total_memory
            if place.on_gpu
            else psutil.virtual_memory().total,
            without_storage=trained,
        )

    @property
    def layers(self) -> int:
        return self.model.text_config.num_hidden_layers

    @property
    def state_bytes(self) -> int:
        """Of all trained parameters under ZeRO-3 on one rank, at most."""
        return self.parameters * sum(STATE_BYTES.values())

    @property
    def fitting_layers(self) -> int:
        """Of the decoder, whose state the device holds beside the rest of the model."""
        room = _USABLE_SHARE * self.device_bytes - _REST_BYTES - self.tower_bytes
        others = self.parameters - self.layers * self.layer_parameters
        return min(self.layers, max(1, int((room / sum(STATE_BYTES.values()) - others) / self.layer_parameters)))

    def with_layers(self, layers: int) -> Blip3Config:
        """The model with fewer decoder layers."""
        model = copy.deepcopy(self.model)
        model.text_config.num_hidden_layers = layers
        model.text_config.layer_types = None
        return model

    def micro_batch(self, place: Place) -> MicroBatch:
        """The recipe's: sequences of image-text documents of an eighth of a sequence, all text with labels."""
        length = self.sequence_tokens // 8
        documents = [(length - self.model.layout.visual_tokens(NO_GRID), (NO_GRID,))] * 8
        count = self.recipe.batch.micro_batch_sequences
        return micro_batch(self.model, documents * count, seed=0, masked_share=0.0, pinned=place.on_gpu)


def flops_of(model: nn.Module, tower: nn.Module, config: Blip3Config, batch: MicroBatch) -> float:
    """Model FLOPs of forward and backward of a micro-batch, as metrics/flops.py counts them."""
    flops = ModelFlops.of(model, tower, config)
    return flops.of_step(
        tokens=len(batch.input_ids),
        labels=batch.valid_labels,
        pairs=attended_pairs(np.array(batch.doc_lens), flops.window),
        tiles=len(batch.tiles),
        images=len(batch.grid),
    )


def rates(place: Place, tokens: int, flops: float, seconds: float, what: str) -> Iterator[Result]:
    """Tokens/s, and the share of the device's peak where that is known."""
    peak = peak_flops(torch.cuda.get_device_name(place.device)) if place.on_gpu else None
    yield Result(f"{what}: time", "median of 5", seconds, "s")
    yield Result(f"{what}: speed", f"{tokens:,} tokens", tokens / seconds, "tokens/s")
    yield Result(
        f"{what}: FLOP/s", "of the model, by formula, nothing counted twice", flops / seconds / 1e12, "TFLOP/s"
    )
    yield Result(
        f"{what}: MFU", f"share of {peak / 1e12:.0f} TFLOP/s" if peak else "the device's peak is not known here",
        flops / seconds / peak if peak else None,
    )  # fmt: skip


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
