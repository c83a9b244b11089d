"""Fixed sampling: an image has the same number of visual tokens, however many tiles it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megablip.model.packing import on_device
from megablip.model.samplers.base import SamplerFlops, VisualTokens, tiles_of
from megablip.model.samplers.instruction import Instruction
from megablip.model.samplers.perceiver import PerceiverResampler


class FixedResampler(PerceiverResampler):
    """The Perceiver resampler, reading all tiles of an image at once (xGen-MM's `anyres_fixed`).

    Parameters are those of the per-tile resampler, and so are their values where
    released weights are loaded.  Latents take patches as a set, so that the
    released layout of tiles makes no difference here.
    """

    @classmethod
    def visual_tokens(cls, settings: Mapping[str, int], patches_per_side: int) -> VisualTokens:
        return VisualTokens(per_image=settings["num_latents"])

    def flops(self, patches: int) -> SamplerFlops:
        return SamplerFlops(per_tile=self._media_flops(patches), per_image=self._latent_flops())

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, dim] features -> [I, num_latents, output_dim]."""
        tiles = tiles_of(grids)
        widest, patches = max(tiles), patch_mask.shape[1]
        # Tile of each place in [I, widest]; past an image's own tiles any tile, unseen.
        starts = torch.tensor(tiles).cumsum(0) - torch.tensor(tiles)
        place = torch.arange(widest)
        own = place < torch.tensor(tiles)[:, None]
        index = torch.where(own, starts[:, None] + place, 0)
        mask = patch_mask.bool()[index] & own[:, :, None]
        rows = on_device(index.flatten().numpy(), features.device)
        gathered = features.index_select(0, rows).unflatten(0, index.shape)
        return super().forward(gathered.flatten(1, 2), mask.view(len(tiles), widest * patches))
