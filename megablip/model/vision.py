"""The frozen vision tower: tiles to patch features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """An untrained tower, frozen; the caller loads its weights.

    SDPA unless the config says otherwise: without a backward it is the fastest
    also on the CPU in bf16 (1.1 times plain products at 36 patches, 3 times at 576).
    """
    return freeze(AutoModel.from_config(config, attn_implementation=config._attn_implementation or "sdpa"))


def freeze(tower: PreTrainedModel) -> PreTrainedModel:
    """No gradients, no dropout."""
    return tower.requires_grad_(False).eval()


@torch.no_grad()
def encode_tiles(tower: nn.Module, tiles: Tensor, chunk_tiles: int = 64) -> Tensor:
    """Patch features: those after the last layer and the final norm, as xGen-MM takes them.

    Args:
        tiles: uint8[N, 3, S, S] pixels, or floating point and already normalised.
        chunk_tiles: tiles that pass the tower at once; bounds its activations.

    Returns:
        [N, P, C] in the tower's precision.
    """
    weight = next(tower.parameters())
    tiles = tiles.to(weight.device)
    if tiles.dtype == torch.uint8:
        tiles = normalize_pixels(tiles)
    tiles = tiles.to(weight.dtype)
    return torch.cat([tower(pixel_values=chunk).last_hidden_state for chunk in tiles.split(chunk_tiles)])


def normalize_pixels(tiles: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]: mean and standard deviation 0.5, as SigLIP was trained."""
    return tiles.to(torch.float32).div_(127.5).sub_(1.0)
