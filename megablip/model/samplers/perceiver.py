"""From a tile's patch features to a fixed number of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from megablip.model.attention import varlen_attention
from megablip.model.packing import VisibleKeys, on_device
from megablip.model.samplers.base import Sampler, SamplerFlops, VisualTokens
from megablip.model.samplers.instruction import Instruction


class PerceiverResampler(Sampler):
    """Latents that read a tile's patches: the sampler of xGen-MM.

    Shape and parameter names are those of the released weights (salesforce/LAVIS,
    branch xgen-mm, helpers.py): blocks work at the tower's width, the projection
    to the decoder's width comes last.  Media carry no position encoding.  At full
    size (width 1152, 6 layers, 16 heads x 96, 128 latents, 3072 out) it has
    109,901,568 parameters.

    Args:
        dim: width of the vision tower's features.
        output_dim: width of the decoder.
        num_latents: visual tokens of a tile.
        ff_mult: width of the feed-forward layer over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        output_dim: int,
        depth: int = 6,
        heads: int = 16,
        dim_head: int = 96,
        num_latents: int = 128,
        ff_mult: int = 4,
    ):
        super().__init__()
        self._dim, self._inner, self._latents, self._ff_mult = dim, heads * dim_head, num_latents, ff_mult
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(PerceiverBlock(dim, heads, dim_head, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, output_dim)

    @classmethod
    def visual_tokens(cls, settings: Mapping[str, int], patches_per_side: int) -> VisualTokens:
        return VisualTokens(per_tile=settings["num_latents"])

    def init_parameters(self) -> None:
        init.normal_(self.latents)

    def flops(self, patches: int) -> SamplerFlops:
        return SamplerFlops(per_tile=self._media_flops(patches) + self._latent_flops())

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, dim] features, bool[N, P] (True where the patch shows the image) -> [N, num_latents, output_dim]."""
        features = features.to(self.latents.dtype)
        return self._resample(features, patch_mask, self.latents.expand(len(features), -1, -1))

    def _resample(self, features: Tensor, patch_mask: Tensor, queries: Tensor, extra_mask: Tensor | None = None):
        """What the latents, the first of the [N, Q, dim] queries, have read in the end.

        Args:
            extra_mask: bool[N, Q - num_latents] on the host, False where a query past the latents is padding.
        """
        # Latents see each other always, so a tile of padding only has something to attend to.
        parts = [patch_mask.numpy(), np.ones((len(queries), len(self.latents)), bool)]
        seen = np.concatenate(parts if extra_mask is None else [*parts, extra_mask.numpy()], axis=1)
        keys = VisibleKeys.from_mask(seen, queries.shape[1], features.device)
        for block in self.layers:
            queries = block(queries, features, keys)
        return self.projection(self.norm(queries[:, : len(self.latents)]))

    def _media_flops(self, patches: int) -> int:
        """What `patches` patches cost as keys and values."""
        return len(self.layers) * patches * (2 * 2 * self._dim * self._inner + 4 * self._latents * self._inner)

    def _latent_flops(self) -> int:
        """The rest, for one set of latents."""
        rows = self._latents
        products = rows * (4 * self._dim * self._inner + 2 * self._dim * self._dim * self._ff_mult)
        attention = 2 * rows * rows * self._inner
        return 2 * len(self.layers) * (products + attention) + 2 * rows * self._dim * self.projection.out_features


class PerceiverBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each added to the latents; named 0 and 1 in the released weights."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int):
        super().__init__()
        self.add_module("0", PerceiverAttention(dim, heads, dim_head))
        self.add_module("1", feed_forward(dim, ff_mult))

    def forward(self, latents: Tensor, media: Tensor, keys: VisibleKeys) -> Tensor:
        """[N, Q, dim], [N, P, dim] -> [N, Q, dim]; `keys`: which of a tile's P + Q are seen."""
        attention, feed = self.children()
        latents = latents + attention(media, latents, keys)
        return latents + feed(latents)


class PerceiverAttention(nn.Module):
    """Latents attend to the media and to themselves."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, media: Tensor, latents: Tensor, keys: VisibleKeys) -> Tensor:
        """[N, P, dim], [N, Q, dim] -> [N, Q, dim]; `keys`: which of a tile's P + Q are seen."""
        latents = self.norm_latents(latents)
        query = self.to_q(latents).flatten(0, 1)
        # Only what is seen is projected: padding costs no product.
        key, value = self.to_kv(keys.take(torch.cat([self.norm_media(media), latents], dim=1))).chunk(2, dim=-1)
        query, key, value = (rows.unflatten(-1, (self.heads, -1)) for rows in (query, key, value))
        layouts = {"layout_q": keys.queries, "layout_k": keys.keys}
        out = varlen_attention(query, key, value, **layouts, causal=False, scale=self.scale)
        return self.to_out(out.flatten(1)).view_as(latents)


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    )


def regroup_released(features: Tensor, patch_mask: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Hand the sampler strips where it would get crops, as the released weights expect.

    xGen-MM stitches an image's crops into one map of patches and cuts it again
    with a plain view.  With more than one column the groups are then full-width
    strips of patches, not crops.  Released weights were trained and served so;
    the sampler knows no positions, so only the grouping matters.

    Args:
        features: [N, P, C], tiles of all images in order: base tile, then crops row by row.
        patch_mask: [N, P] on the host.
        grids: (columns, rows) of each image.  Tiles past the last image (the
            dummy tile) stay as they are.
    """
    tiles, patches = patch_mask.shape
    side = round(patches**0.5)
    index = torch.arange(tiles * patches)
    start = 0
    for columns, rows in grids:
        first, start = start + 1, start + 1 + columns * rows
        if columns == 1:
            continue  # the strips are the crops
        crops = index[first * patches : start * patches]
        crops.copy_(crops.view(rows, columns, side, side).transpose(1, 2).reshape(-1))
    return (
        features.flatten(0, 1).index_select(0, on_device(index.numpy(), features.device)).view_as(features),
        patch_mask.flatten().index_select(0, index).view_as(patch_mask),
    )
