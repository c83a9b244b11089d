"""Instruction-aware sampling: the question joins the latents, and what is sampled may depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from megablip.model.samplers.base import image_of_tile
from megablip.model.samplers.instruction import Instruction
from megablip.model.samplers.perceiver import PerceiverResampler


class InstructResampler(PerceiverResampler):
    """The Perceiver resampler with the instruction's tokens as further queries, which are dropped in the end.

    xGen-MM tried it (arXiv 2408.08872, section 7.3, after InstructBLIP).  The tokens
    are the decoder's input embeddings, projected to the latents' width; they pass
    every layer beside the latents, see patches and latents, and are seen by them.
    """

    reads_instruction: ClassVar[bool] = True

    def __init__(self, *, dim: int, output_dim: int, **settings: int):
        super().__init__(dim=dim, output_dim=output_dim, **settings)
        self.instruction_projection = nn.Linear(output_dim, dim)

    @classmethod
    def defaults(cls) -> dict[str, int]:
        return PerceiverResampler.defaults()

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, dim] features -> [N, num_latents, output_dim]."""
        features = features.to(self.latents.dtype)
        image = image_of_tile(grids, features.device)
        words = self.instruction_projection(instruction.embeds.to(self.latents.dtype)).index_select(0, image)
        queries = torch.cat([self.latents.expand(len(features), -1, -1), words], dim=1)
        return self._resample(features, patch_mask, queries, instruction.mask.index_select(0, image).cpu())
