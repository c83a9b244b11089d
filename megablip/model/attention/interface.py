"""The one call, and how transformers' decoders reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megablip.errors import ConfigError
from megablip.model.attention.kernels import flash_attn, torch_varlen
from megablip.model.attention.per_document import dense, per_document
from megablip.model.attention.select import backend_for
from megablip.model.packing import PackedLayout

ATTENTION = "megablip_varlen"
"""The name under which transformers knows this attention."""

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": flash_attn,
    "torch_varlen": torch_varlen,
    "per_document": per_document,
    "dense": dense,
}


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout_q: PackedLayout,
    layout_k: PackedLayout,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention from each document's queries to the same document's keys, and to no others.

    The layouts hold int32 cu_seqlens on the device and the lengths as Python ints,
    so that nothing waits for the device.

    Args:
        q: [T_q, heads, D].
        k, v: [T_k, kv_heads, D], where kv_heads divides heads.
        layout_q, layout_k: lengths of the documents' queries and keys.
        causal: a query sees the keys up to its own place; needs `layout_q is layout_k`,
            because kernels differ in how they align other lengths.
        window: keys that a query sees at most, itself included; needs `causal`.
        scale: factor of the scores before the softmax; None: D ** -0.5.

    Returns:
        [T_q, heads, D].
    """
    if window is not None and not causal:
        raise ValueError("a sliding window needs causal attention")
    if causal and layout_q is not layout_k:
        raise ValueError("causal attention needs one layout for queries and keys")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    backend = BACKENDS[backend_for(q.device.type, q.dtype, q.shape[-1])]
    return backend(q, k, v, layout_q=layout_q, layout_k=layout_k, causal=causal, scale=scale, window=window)


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: [B, heads, Q, D] in, [B, Q, heads, D] out, no weights."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    unknown = ["attention_dropout"] * bool(dropout) + [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise ConfigError(
            f"the decoder's attention has {', '.join(unknown)}, and packed attention has not",
            where=type(module).__name__,
            remedy="switch it off in the decoder's config, or take another decoder",
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    window = options.get("sliding_window")
    out = varlen_attention(q, k, v, layout_q=packing, layout_k=packing, causal=True, window=window, scale=scaling)
    return out.unsqueeze(0), None


# What some decoders hand to their attention and no backend has: Gemma 2's soft cap, gpt-oss's sinks.
_UNKNOWN = ("softcap", "s_aux", "position_bias")

AttentionInterface.register(ATTENTION, _attention_interface)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
