"""Vision tower and sampler at full size (SigLIP-so400m, 384 pixels; the released sampler), 12 tiles in bf16.

The tower is frozen: forward.  The sampler is trained: forward and backward.  The
rival is transformers' SigLIP on the processor's pixel values, and the sampler as
one writes it plainly: a batch of tiles through SDPA with a mask.  Weights are random
and the same on both sides; two tiles are padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megablip.model.samplers import PerceiverResampler
from megablip.model.vision import encode_tiles, freeze
from tools.bench.core import Rival, Row, median_seconds
from tools.bench.step import all_threads, gradients, relative_error

TILES, PADDED_TILES = 12, 2
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14, "vision_use_head": False,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
DECODER_WIDTH = 3072


def rows() -> list[Row]:
    with all_threads():
        return [*sampler_rows(), *tower_rows()]


def tower_rows() -> list[Row]:
    """Both together, from pixels to the sampler's gradients."""
    torch.manual_seed(0)
    tower = freeze(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).to(torch.bfloat16))
    ours, theirs = samplers()
    tiles = torch.randint(0, 256, (TILES, 3, 384, 384), dtype=torch.uint8)
    mask = patch_mask()

    @torch.no_grad()
    def features() -> Tensor:
        pixels = ((tiles.float() / 255 - 0.5) / 0.5).to(torch.bfloat16)
        return tower(pixel_values=pixels).last_hidden_state

    sides = {
        "ours": lambda: train(ours, encode_tiles(tower, tiles), mask),
        "theirs": lambda: train(theirs, features(), mask),
    }
    return compared("tower_and_sampler", sides, (ours, theirs))


def sampler_rows() -> list[Row]:
    ours, theirs = samplers()
    features = torch.randn(TILES, 729, SIGLIP["hidden_size"], dtype=torch.bfloat16)
    mask = patch_mask()
    sides = {"ours": lambda: train(ours, features, mask), "theirs": lambda: train(theirs, features, mask)}
    return compared("sampler", sides, (ours, theirs))


def compared(name: str, sides: dict, modules: tuple[nn.Module, nn.Module]) -> list[Row]:
    seconds = median_seconds(sides)
    rival = Rival("transformers, plain sampler" if "tower" in name else "plain sampler", seconds["theirs"] * 1e3)
    error = relative_error(*(gradients(module) for module in modules))
    return [
        Row(name, seconds["ours"] * 1e3, "ms", "lower", goal=1.0, rival=rival),
        Row(f"{name}_gradient_error", error, "", "lower", goal=0.02),
    ]


def samplers() -> tuple[PerceiverResampler, PlainSampler]:
    sizes = PerceiverResampler.defaults()
    torch.manual_seed(0)
    ours = PerceiverResampler(dim=SIGLIP["hidden_size"], output_dim=DECODER_WIDTH, **sizes).to(torch.bfloat16)
    theirs = PlainSampler(sizes).to(torch.bfloat16)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def patch_mask() -> Tensor:
    mask = torch.ones(TILES, 27, 27, dtype=torch.bool)
    mask[:PADDED_TILES, 18:] = False
    return mask.flatten(1)


def train(sampler: nn.Module, features: Tensor, mask: Tensor) -> None:
    sampler.zero_grad()
    sampler(features, mask).float().square().mean().backward()


class PlainSampler(nn.Module):
    """As in OpenFlamingo, which xGen-MM's is from, with SDPA; weights have the same names."""

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        dim, inner = SIGLIP["hidden_size"], sizes["heads"] * sizes["dim_head"]
        self.heads = sizes["heads"]
        self.latents = nn.Parameter(torch.empty(sizes["num_latents"], dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([_attention(dim, inner), _feed_forward(dim, sizes["ff_mult"])]) for _ in range(sizes["depth"])
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, DECODER_WIDTH)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        batch = len(features)
        latents = self.latents.expand(batch, -1, -1)
        seen = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]
        for attention, feed_forward in self.layers:
            media, normed = attention["norm_media"](features), attention["norm_latents"](latents)
            q = attention["to_q"](normed)
            k, v = attention["to_kv"](torch.cat([media, normed], dim=1)).chunk(2, dim=-1)
            q, k, v = (x.view(batch, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            latents = latents + attention["to_out"](out.transpose(1, 2).flatten(2))
            latents = latents + feed_forward(latents)
        return self.projection(self.norm(latents))


def _attention(dim: int, inner: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm_media": nn.LayerNorm(dim),
            "norm_latents": nn.LayerNorm(dim),
            "to_q": nn.Linear(dim, inner, bias=False),
            "to_kv": nn.Linear(dim, 2 * inner, bias=False),
            "to_out": nn.Linear(inner, dim, bias=False),
        }
    )


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    )
