"""The frozen vision tower: tiles to patch features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

# SDPA on the CPU is 2.7 times slower than plain products on 36 patches in bf16;
# on 729 patches plain products hold 16 heads x 729 x 729 scores for each tile.
_EAGER_PATCHES = 256


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """An untrained tower, frozen; the caller loads its weights."""
    patches = (config.image_size // config.patch_size) ** 2
    attention = config._attn_implementation or ("eager" if patches <= _EAGER_PATCHES else "sdpa")
    return freeze(AutoModel.from_config(config, attn_implementation=attention))


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
