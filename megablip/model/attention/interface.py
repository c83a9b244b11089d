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
    check_options(options, type(module).__name__)
    if packing is None:
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:  # what stands for none in a pack
            raise ConfigError(
                "a layer of the decoder attends without knowing where documents end",
                where=type(module).__name__,
                remedy="take a decoder whose layers hand all arguments to the attention, as Llama's do",
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if dropout:
        raise _lacks("attention_dropout", type(module).__name__)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    window = options.get("sliding_window")
    out = varlen_attention(q, k, v, layout_q=packing, layout_k=packing, causal=True, window=window, scale=scaling)
    return out.unsqueeze(0), None


def check_options(options: dict[str, Any], where: str) -> None:
    """Raises ConfigError for what changes an attention and no backend has: Gemma 2's soft cap, gpt-oss's sinks."""
    known = _KNOWN if options.get("is_causal", True) else _KNOWN - {"is_causal"}
    unknown = sorted(name for name, value in options.items() if value is not None and name not in known)
    if unknown:
        raise _lacks(", ".join(unknown), where)


# What decoders hand to their attention: their window, what is rotated in already, and what is about caches and results.
_KNOWN = {
    "sliding_window",
    "is_causal",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def _lacks(what: str, where: str) -> ConfigError:
    return ConfigError(
        f"the decoder's attention has {what}, and the attention here has not",
        where=where,
        remedy="switch it off in the decoder's config, or take another decoder",
    )


AttentionInterface.register(ATTENTION, _attention_interface)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
