"""Attention of a pack, forward and backward: 32 heads x 96 (Phi-3-mini's), beside SDPA with the block-diagonal mask.

The mask is what transformers gives its SDPA for packed position ids; here it is
made beforehand, outside the clock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megablip.model.attention import varlen_attention
from megablip.model.attention.per_document import causal_mask
from megablip.model.packing import PackedLayout
from tools.bench.core import Rival, Row, median_seconds

HEADS, DIM = 32, 96
GOALS = {("bf16", 8): 2.4, ("fp32", 8): 3.6, ("bf16", 16): 4.5, ("fp32", 16): 6.5}
PACKS = {8: 2048, 16: 4096}  # documents: tokens
ALONE = (128, 512, 1024, 2048)
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def rows() -> list[Row]:
    found = []
    for name, dtype in TYPES.items():
        for documents, tokens in PACKS.items():
            lengths = random_lengths(tokens, documents)
            found.append(row(f"{name} {tokens} tokens in {documents}", lengths, dtype, GOALS[name, documents]))
        for tokens in ALONE:
            same_kernel = name == "fp32" and tokens < 384  # equal, but for the noise
            goal = 0.97 if same_kernel else 1.0
            found.append(row(f"{name} {tokens} tokens in 1", [tokens], dtype, goal))
        found.append(deterministic_row(name, dtype))
    return found


def row(name: str, lengths: list[int], dtype: torch.dtype, goal: float) -> Row:
    layout, tensors = PackedLayout.from_lengths(lengths), inputs(sum(lengths), dtype)
    mask = layout.document_index[:, None] == layout.document_index
    mask &= causal_mask(len(mask), len(mask), None, mask.device)
    sides = {"ours": lambda: varlen(tensors, layout), "dense": lambda: dense(tensors, mask)}
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*(side() for side in sides.values()), strict=True)]
    assert max(errors) < (2e-2 if dtype == torch.bfloat16 else 1e-5), errors
    seconds = median_seconds(sides, repeats=5 if sum(lengths) > 512 else 21)
    return Row(name, seconds["ours"] * 1e3, "ms", "lower", goal, Rival("SDPA, mask", seconds["dense"] * 1e3))


def deterministic_row(name: str, dtype: torch.dtype) -> Row:
    """What torch's switch costs: the same with it and without."""
    lengths = random_lengths(2048, 8)
    layout, tensors = PackedLayout.from_lengths(lengths), inputs(2048, dtype)
    seconds = median_seconds(
        {
            "deterministic": lambda: deterministic(lambda: varlen(tensors, layout)),
            "free": lambda: varlen(tensors, layout),
        }
    )
    rival = Rival("free", seconds["free"] * 1e3)
    return Row(f"{name} deterministic", seconds["deterministic"] * 1e3, "ms", "lower", 0.9, rival)


def random_lengths(tokens: int, documents: int) -> list[int]:
    """Lengths that differ by a factor of about ten; their squares make up 1.5 / documents of the pack's."""
    shares = np.random.default_rng(0).uniform(0.2, 2.2, documents)
    ends = np.round(np.cumsum(shares) / shares.sum() * tokens).astype(int)
    return np.diff(ends, prepend=0).tolist()


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """[heads, tokens, dim], as a decoder's attention has them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(HEADS, tokens, DIM, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def varlen(tensors: list[Tensor], layout: PackedLayout) -> list[Tensor]:
    views = (x.transpose(0, 1) for x in tensors)
    out = varlen_attention(*views, layout_q=layout, layout_k=layout, causal=True)
    return _with_gradients(out.transpose(0, 1), tensors)


def dense(tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    return _with_gradients(F.scaled_dot_product_attention(*(x[None] for x in tensors), attn_mask=mask)[0], tensors)


def _with_gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, tensors, tensors[0].detach())]


def deterministic(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as engine.determinism
    try:
        return function()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
