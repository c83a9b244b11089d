"""Attention over packed documents: one call, several backends.

`varlen_attention` takes documents laid end to end, without padding, and lets no
token see another document.  Importing this module registers it with transformers
under `ATTENTION`; a model built with `attn_implementation=ATTENTION` uses it where
its forward gets `packing=PackedLayout(...)`, and ordinary dense attention where it
doesn't (generation, with a KV cache and left padding).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from megablip.errors import ConfigError
from megablip.model.packing import PackedLayout, ShortDocuments

ATTENTION = "megablip_varlen"
"""The name under which transformers knows this attention."""

_HALF = (torch.bfloat16, torch.float16)

# The CPU's fused attention has a slow backward in half precision.  Up to this many
# tokens plain matrix products beat it, forward and backward, with 4 heads x 32 and
# with 32 heads x 96: 3 to 5 times at 32 tokens, 1.3 times at 512; at 1024 they lose.
_SHORT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Backend:
    """How `varlen_attention` runs on a device, and why so."""

    name: str
    reason: str


@cache
def select_backend(device_type: str, dtype: torch.dtype) -> Backend:
    """The backend for tensors of `dtype` on "cuda" or "cpu".  Nothing is required at installation."""
    if device_type != "cuda":
        return Backend("per_document", f"no varlen kernel exists for {device_type}")
    if dtype not in _HALF:
        return Backend("per_document", f"varlen kernels take bf16 and fp16, not {dtype}")
    if torch.cuda.get_device_capability() < (8, 0):
        return Backend("per_document", "varlen kernels need compute capability 8.0 (Ampere)")
    if importlib.util.find_spec("flash_attn") is not None:
        return Backend("flash_attn", "the flash-attn package is installed")
    return Backend("torch_varlen", "torch's own kernel; the flash-attn package is not installed")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: PackedLayout,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Self-attention within each document of a pack.

    Args:
        query: [T, heads, D].
        key, value: [T, kv_heads, D], where kv_heads divides heads.
        layout: the documents' lengths.
        scale: factor of the scores before the softmax.
        window: keys that a query sees at most, itself included; needs `causal`.

    Returns:
        [T, heads, D].
    """
    if window is not None and not causal:
        raise ValueError("a sliding window needs causal attention")
    backend = select_backend(query.device.type, query.dtype).name
    return _BACKENDS[backend](query, key, value, layout=layout, causal=causal, scale=scale, window=window)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of a plain batch: [B, heads, Q, D] over [B, heads, K, D].

    Args:
        mask: bool, broadcastable to [B, heads, Q, K]; True where a key is seen.
            Each query must see a key.
    """
    if query.device.type == "cpu" and query.dtype in _HALF and key.shape[-2] <= _SHORT_TOKENS:
        scores = torch.matmul(query * scale, key.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(-1), value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


# --- Backends -----------------------------------------------------------------------


def _flash_attn(q, k, v, *, layout: PackedLayout, causal: bool, scale: float, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    # By keyword only: the order differs between flash-attn 2, 3 and 4.
    return flash_attn_varlen_func(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_k=layout.cu_seqlens,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_k=layout.max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=(window - 1, 0) if window is not None else (-1, -1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _torch_varlen(q, k, v, *, layout: PackedLayout, causal: bool, scale: float, window: int | None) -> Tensor:
    # Its backward looks at torch's flag of determinism by itself.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query=q.contiguous(),
        key=k.contiguous(),
        value=v.contiguous(),
        cu_seq_q=layout.cu_seqlens,
        cu_seq_k=layout.cu_seqlens,
        max_q=layout.max_seqlen,
        max_k=layout.max_seqlen,
        scale=scale,
        # Causal attention is a window that is open to the left only.
        window_size=(window - 1 if window is not None else -1, 0 if causal else -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _per_document(q, k, v, *, layout: PackedLayout, causal: bool, scale: float, window: int | None) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, T, D]
    limit = _SHORT_TOKENS if q.device.type == "cpu" and q.dtype in _HALF and causal else 0
    short = layout.short_documents(limit)
    if len(short.documents) == len(layout.doc_lens):
        return _ShortDocumentAttention.apply(q, k, v, short, scale, window).transpose(0, 1)
    # split, never an index in a loop: each slice's backward would fill a full gradient.
    pieces = list(zip(*(x.split(layout.doc_lens, dim=1) for x in (q, k, v)), strict=True))
    outputs: list[Tensor] = [None] * len(pieces)  # type: ignore[list-item]
    if short.documents:
        joined = (torch.cat([pieces[d][part] for d in short.documents], dim=1) for part in range(3))
        out = _ShortDocumentAttention.apply(*joined, short, scale, window)
        lengths = [layout.doc_lens[d] for d in short.documents]
        for document, piece in zip(short.documents, out.split(lengths, dim=1), strict=True):
            outputs[document] = piece
    for document, (q_doc, k_doc, v_doc) in enumerate(pieces):
        if outputs[document] is None:
            outputs[document] = _one_document(q_doc, k_doc, v_doc, causal, scale, window)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _one_document(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """[heads, n, D] over [kv_heads, n, D] by SDPA; in query blocks where the window is narrower than n."""
    n, gqa = q.shape[1], q.shape[0] != k.shape[0]
    if window is None or n <= window:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, scale=scale, enable_gqa=gqa)
        return out[0]
    blocks = []
    for start in range(0, n, window):
        end, first = min(start + window, n), max(0, start - window + 1)
        band = _causal_mask(end - start, end - first, window, q.device)
        blocks.append(
            F.scaled_dot_product_attention(
                q[None, :, start:end],
                k[None, :, first:end],
                v[None, :, first:end],
                attn_mask=band,
                scale=scale,
                enable_gqa=gqa,
            )[0]
        )
    return torch.cat(blocks, dim=1)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool[queries, keys], True where seen; the last query stands at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class _ShortDocumentAttention(torch.autograd.Function):
    """Causal attention of short documents by padded batches of matrix products.

    One gather lays all documents into length buckets, one gather takes the result
    back.  Padding stands after a document's end, so no real query sees it, and its
    gradients enter as zeros.  Scores are products of the inputs' precision; the
    softmax computes in float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, short: ShortDocuments, scale: float, window: int | None):
        heads, kv_heads = len(q), len(k)
        dim = q.shape[-1]
        q_rows = _rows(q).index_select(0, short.pad_index(heads))
        k_rows, v_rows = (_rows(x).index_select(0, short.pad_index(kv_heads)) for x in (k, v))
        out_rows = torch.empty_like(q_rows)
        probabilities = []
        for bucket in short.buckets:
            q_b, out_b = (bucket.view(x, heads, kv_heads) for x in (q_rows, out_rows))
            k_b, v_b = (bucket.view(x, kv_heads, kv_heads) for x in (k_rows, v_rows))
            mask = short.causal_bias(bucket.length, heads // kv_heads, window, q.dtype)
            scores = torch.baddbmm(mask, q_b, k_b.transpose(1, 2), alpha=scale)
            probabilities.append(torch.softmax(scores, dim=-1))
            torch.bmm(probabilities[-1], v_b, out=out_b)
        ctx.save_for_backward(q_rows, k_rows, v_rows, *probabilities)
        ctx.short, ctx.scale, ctx.heads, ctx.kv_heads = short, scale, heads, kv_heads
        return out_rows.index_select(0, short.unpad_index(heads)).view(heads, -1, dim)

    @staticmethod
    def backward(ctx, grad_out):
        q_rows, k_rows, v_rows, *probabilities = ctx.saved_tensors
        short, heads, kv_heads = ctx.short, ctx.heads, ctx.kv_heads
        # Padding takes the extra row: zero.
        grad_rows = F.pad(_rows(grad_out), (0, 0, 0, 1)).index_select(0, short.pad_index(heads, extra_row=True))
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_rows, k_rows, v_rows))
        for bucket, probs in zip(short.buckets, probabilities, strict=True):
            q_b, g_b, grad_q_b = (bucket.view(x, heads, kv_heads) for x in (q_rows, grad_rows, grad_q))
            k_b, v_b, grad_k_b, grad_v_b = (
                bucket.view(x, kv_heads, kv_heads) for x in (k_rows, v_rows, grad_k, grad_v)
            )
            torch.bmm(probs.transpose(1, 2), g_b, out=grad_v_b)
            grad_probs = torch.bmm(g_b, v_b.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, k_b, out=grad_q_b)
            torch.bmm(grad_scores.transpose(1, 2), q_b, out=grad_k_b)
        grad_q, grad_k = grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale)
        unpad_q, unpad_kv = short.unpad_index(heads), short.unpad_index(kv_heads)
        grads = (
            x.index_select(0, index).view(n, -1, x.shape[-1])
            for x, index, n in ((grad_q, unpad_q, heads), (grad_k, unpad_kv, kv_heads), (grad_v, unpad_kv, kv_heads))
        )
        return (*grads, None, None, None)


def _rows(x: Tensor) -> Tensor:
    """[heads, T, D] as [heads * T, D]."""
    return x.reshape(-1, x.shape[-1])


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "per_document": _per_document,
}


# --- transformers -------------------------------------------------------------------


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: [B, heads, Q, D] in, [B, Q, heads, D] out, no weights."""
    if dropout:
        raise ConfigError(
            f"attention dropout is {dropout}, and packed attention has none",
            where=type(module).__name__,
            remedy="set attention_dropout to 0 in the decoder's config",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is not None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        out = varlen_attention(q, k, v, layout=packing, causal=True, scale=scale, window=sliding_window)
        return out.unsqueeze(0), None
    queries, keys = query.shape[2], key.shape[2]
    plain_causal = queries == keys and (sliding_window is None or queries <= sliding_window)
    if attention_mask is None and queries > 1 and not plain_causal:
        attention_mask = _causal_mask(queries, keys, sliding_window, query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def _mask_interface(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
):
    """A mask where padding, a cache, or documents told apart by position ids alone need one."""
    if attention_mask is None and q_length == kv_length and allow_is_causal_skip:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


AttentionInterface.register(ATTENTION, _attention_interface)
AttentionMaskInterface.register(ATTENTION, _mask_interface)
