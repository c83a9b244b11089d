"""The instruction-aware Q-Former of InstructBLIP (arXiv 2305.06500), in place of the Perceiver resampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel
from transformers import initialization as init

from megablip.model.samplers.base import Sampler, SamplerFlops, VisualTokens, image_of_tile
from megablip.model.samplers.instruction import Instruction

if TYPE_CHECKING:
    from megablip.model.blip3 import Blip3Config


class QFormerSampler(Sampler):
    """transformers' InstructBlipQFormerModel, tile by tile, and a projection to the decoder's width.

    Sizes are BLIP-2's (arXiv 2301.12597) by default.  It has word embeddings of its
    own, in the decoder's vocabulary.  No dropout, like the rest of the model.

    Args:
        vocab_size: rows of the decoder's embeddings.
        num_queries: visual tokens of a tile.
        cross_attention_every: layers of which one looks at the patches.
    """

    reads_instruction: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        output_dim: int,
        vocab_size: int,
        depth: int = 12,
        heads: int = 12,
        dim_head: int = 64,
        num_queries: int = 32,
        ff_mult: int = 4,
        cross_attention_every: int = 2,
    ):
        super().__init__()
        width, self._queries = heads * dim_head, num_queries
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=ff_mult * width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=None,
                cross_attention_frequency=cross_attention_every,
                encoder_hidden_size=dim,
            )
        )
        self.projection = nn.Linear(width, output_dim)
        self.init_parameters()

    @classmethod
    def visual_tokens(cls, settings: Mapping[str, int], patches_per_side: int) -> VisualTokens:
        return VisualTokens(per_tile=settings["num_queries"])

    @classmethod
    def surroundings(cls, config: Blip3Config) -> dict[str, Any]:
        return super().surroundings(config) | {"vocab_size": config.text_config.vocab_size}

    def init_parameters(self) -> None:
        init.normal_(self.queries, std=self.qformer.config.initializer_range)

    def flops(self, patches: int) -> SamplerFlops:
        config = self.qformer.config
        width, depth, rows = config.hidden_size, config.num_hidden_layers, self._queries
        crossing = -(-depth // config.cross_attention_frequency)
        self_attention = rows * (4 * width**2 + 2 * config.intermediate_size * width) + 2 * rows**2 * width
        cross_attention = 2 * rows * width**2 + 2 * rows * patches * width
        of_features = 2 * crossing * patches * 2 * config.encoder_hidden_size * width
        rest = depth * self_attention + crossing * cross_attention + rows * width * self.projection.out_features
        return SamplerFlops(of_features + 2 * rest, of_features=of_features)

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, dim] features -> [N, num_queries, output_dim]."""
        image = image_of_tile(grids, features.device)
        words = instruction.mask.index_select(0, image)
        seen = patch_mask.bool().to(features.device)
        seen = seen | ~seen.any(dim=1, keepdim=True)  # a tile of padding only: something must be attended to
        queries = self.queries.expand(len(features), -1, -1)
        read = self.qformer(
            input_ids=instruction.ids.index_select(0, image),
            attention_mask=torch.cat([words.new_ones(queries.shape[:2]), words], dim=1),
            query_embeds=queries,
            encoder_hidden_states=features.to(queries.dtype),
            encoder_attention_mask=seen,
        ).last_hidden_state
        return self.projection(read[:, : queries.shape[1]])
