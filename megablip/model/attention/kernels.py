"""GPU kernels that other packages have, each behind an adapter of the same form.

Called by keyword only: the order of arguments differs between flash-attn 2, 3 and
4.  tests/fixtures/attention_signatures.json has the signatures that these calls
are checked against.
"""

from __future__ import annotations

import torch
from packaging.version import Version
from torch import Tensor

from megablip.model.packing import PackedLayout

# torch 2.11 takes grouped queries as they come; later ones want to be told, so that they are no oversight.
_ASKS_FOR_GROUPS = Version(torch.__version__) >= Version("2.12")


def flash_attn(
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
    """The flash-attn package, version 2."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (_unit_stride(x) for x in (q, k, v))
    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=layout_q.cu_seqlens,
        cu_seqlens_k=layout_k.cu_seqlens,
        max_seqlen_q=layout_q.max_seqlen,
        max_seqlen_k=layout_k.max_seqlen,
        softmax_scale=scale,
        causal=causal,
        # Keys to the left of a query, which sees itself besides.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def torch_varlen(
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
    """torch's own: flash-attn 2 as built into torch, or 3 or 4 where activated (select.py).

    Its backward looks at torch's flag of determinism by itself.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (_unit_stride(x) for x in (q, k, v))
    return varlen_attn(
        query=q,
        key=k,
        value=v,
        cu_seq_q=layout_q.cu_seqlens,
        cu_seq_k=layout_k.cu_seqlens,
        max_q=layout_q.max_seqlen,
        max_k=layout_k.max_seqlen,
        scale=scale,
        # Causal attention is a window that is open to the left only.
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        **({"enable_gqa": q.shape[1] != k.shape[1]} if _ASKS_FOR_GROUPS else {}),
    )


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any layout whose last dimension is contiguous: no copy of a transposed view."""
    return x if x.stride(-1) == 1 else x.contiguous()
