"""No resampling: each visual token is a place in the tile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablip.model.samplers.base import Sampler, SamplerFlops, VisualTokens
from megablip.model.samplers.instruction import Instruction

POOL = 2


class MLPSampler(Sampler):
    """2x2 max-pooling of a tile's patches, then an MLP (arXiv 2408.08872, table 5).

    With an odd number of patches in a row the last column and row are pooled by
    themselves, so that no patch is lost: 27 x 27 patches make 14 x 14 tokens.
    Padding never wins; where all four patches are padding the MLP sees zeros.
    """

    reads_positions: ClassVar[bool] = True

    def __init__(self, *, dim: int, output_dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, output_dim), nn.GELU(), nn.Linear(output_dim, output_dim))

    @classmethod
    def visual_tokens(cls, settings: Mapping[str, int], patches_per_side: int) -> VisualTokens:
        return VisualTokens(per_tile=_cells(patches_per_side))

    def flops(self, patches: int) -> SamplerFlops:
        first, last = self.layers[0], self.layers[2]
        cells = _cells(math.isqrt(patches))
        of_features = 2 * cells * first.in_features * first.out_features
        return SamplerFlops(of_features + 2 * cells * last.in_features * last.out_features, of_features=of_features)

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, dim] features -> [N, tokens, output_dim], row by row."""
        side = math.isqrt(features.shape[1])
        padding = ~patch_mask.bool().to(features.device, non_blocking=True)[:, :, None]
        maps = features.masked_fill(padding, -math.inf).transpose(1, 2).unflatten(2, (side, side))
        pooled = F.max_pool2d(maps, POOL, ceil_mode=True).flatten(2).transpose(1, 2)
        pooled = torch.where(pooled.isneginf(), 0, pooled)
        return self.layers(pooled.to(self.layers[0].weight.dtype))


def _cells(patches_per_side: int) -> int:
    return math.ceil(patches_per_side / POOL) ** 2
