"""Attention without a kernel of its own: one document, or one batch of like documents, at a time.

The path of CPUs, and of GPUs that no varlen kernel supports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megablip.model.packing import PackedLayout, ShortDocuments

HALF = (torch.bfloat16, torch.float16)

# The CPU's fused attention has a slow backward in half precision.  Up to this many
# tokens plain matrix products beat it, forward and backward, with 4 heads x 32 and
# with 32 heads x 96: 3 to 5 times at 32 tokens, 1.3 times at 512; at 1024 they lose.
SHORT_TOKENS = 512

# It takes keys 512 at a time and skips those that no query sees only as a whole
# (ATen/native/cpu/FlashAttentionKernel.cpp).  At these lengths two blocks of queries
# are 10 to 15 % faster: they leave out a quarter of the work.  Below, slices cost more.
_IN_HALVES = range(384, 513)


def per_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout_q: PackedLayout,
    layout_k: PackedLayout,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """varlen_attention, see there; documents of few tokens go by plain matrix products."""
    if not causal and layout_q.is_even:
        return _batch(q, k, v, layout_q=layout_q, layout_k=layout_k, scale=scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, T, D]
    limit = SHORT_TOKENS if causal and _by_products(q) else 0
    short = layout_q.short_documents(limit)
    if len(short.documents) == len(layout_q.doc_lens):
        return _ShortDocumentAttention.apply(q, k, v, short, scale, window).transpose(0, 1)
    if len(layout_q.doc_lens) == 1:
        return _one_document(q, k, v, causal, scale, window).transpose(0, 1)
    # split, never an index in a loop: each slice's backward would fill a full gradient.
    pieces = list(
        zip(
            q.split(layout_q.doc_lens, dim=1),
            k.split(layout_k.doc_lens, dim=1),
            v.split(layout_k.doc_lens, dim=1),
            strict=True,
        )
    )
    outputs: list[Tensor] = [None] * len(pieces)  # type: ignore[list-item]
    if short.documents:
        joined = (torch.cat([pieces[d][part] for d in short.documents], dim=1) for part in range(3))
        out = _ShortDocumentAttention.apply(*joined, short, scale, window)
        lengths = [layout_q.doc_lens[d] for d in short.documents]
        for document, piece in zip(short.documents, out.split(lengths, dim=1), strict=True):
            outputs[document] = piece
    for document, (q_doc, k_doc, v_doc) in enumerate(pieces):
        if outputs[document] is None:
            outputs[document] = _one_document(q_doc, k_doc, v_doc, causal, scale, window)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout_q: PackedLayout,
    layout_k: PackedLayout,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same by one SDPA over the whole pack with a block-diagonal mask: slow, plain, the reference."""
    mask = layout_q.document_index[:, None] == layout_k.document_index
    if causal:
        mask &= causal_mask(len(q), len(k), window, q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool[queries, keys], True where seen; the last query stands at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _by_products(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in HALF


def _batch(q: Tensor, k: Tensor, v: Tensor, *, layout_q: PackedLayout, layout_k: PackedLayout, scale: float) -> Tensor:
    """Documents with equally many queries, which see all of their keys: a plain batch, or a padded one."""
    mask = None
    if not layout_k.is_even:
        k, v = (layout_k.padding.rows.take(x) for x in (k, v))
        mask = layout_k.padding.mask[:, None, None, :]
    q, k, v = (x.unflatten(0, (len(layout_q.doc_lens), -1)).transpose(1, 2) for x in (q, k, v))
    if _by_products(q) and k.shape[2] <= SHORT_TOKENS and q.shape[1] == k.shape[1]:
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.matmul(scores.softmax(-1), v)
    else:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def _one_document(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """[heads, n, D] over [kv_heads, m, D] by SDPA, in blocks of queries where these need few of the keys."""
    n, options = q.shape[1], {"scale": scale, "enable_gqa": q.shape[0] != k.shape[0]}
    block = n if window is None else min(window, n)
    if causal and n in _IN_HALVES and q.device.type == "cpu":
        block = min(block, -(-n // 2))
    if block == n:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, **options)[0]
    outputs = []
    for start, q_block in zip(range(0, n, block), q.split(block, dim=1), strict=True):
        end, first = min(start + block, n), 0 if window is None else max(0, start - window + 1)
        mask = causal_mask(end - start, end - first, window, q.device)
        # A slice's backward fills a whole gradient, so none where all is taken.
        k_block, v_block = (x[:, first:end] if end - first < n else x for x in (k, v))
        out = F.scaled_dot_product_attention(q_block[None], k_block[None], v_block[None], attn_mask=mask, **options)
        outputs.append(out[0])
    return torch.cat(outputs, dim=1)


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
