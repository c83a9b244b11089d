"""Attention to check against, and stand-ins for GPU kernels that keep their packages' contracts.

A stand-in takes keywords only, those of the signature in
tests/fixtures/attention_signatures.json; checks types, shapes, strides and
devices as the kernels do; and computes by the reference, on any device and in
any precision, with gradients.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megablip.model.attention import use_backend

SIGNATURES = json.loads((Path(__file__).parents[1] / "fixtures" / "attention_signatures.json").read_text())
BACKENDS = ("per_document", "dense", "flash_attn", "torch_varlen")
EXACT = ("per_document", "dense")
"""Those on SDPA, whose zeros are exact."""


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int] | None = None,
    *,
    scale: float,
    left: int = -1,
    right: int = -1,
) -> Tensor:
    """Each document by itself, written out: [T_q, heads, D] over [T_k, kv_heads, D], in at least float32.

    Args:
        left, right: keys that a query sees on either side of its own place, -1 for
            all; ends are aligned, as flash-attn says of its window_size.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    for q_doc, k_doc, v_doc in zip(
        q.split(lengths_q), k.split(lengths_k or lengths_q), v.split(lengths_k or lengths_q), strict=True
    ):
        groups = q.shape[1] // k.shape[1]
        k_doc, v_doc = (x.to(exact).repeat_interleave(groups, dim=1) for x in (k_doc, v_doc))
        scores = torch.einsum("qhd,khd->hqk", q_doc.to(exact), k_doc) * scale
        place = torch.arange(len(q_doc))[:, None] + len(k_doc) - len(q_doc)
        key = torch.arange(len(k_doc))
        hidden = torch.zeros(len(q_doc), len(k_doc), dtype=torch.bool)
        if left >= 0:
            hidden |= key < place - left
        if right >= 0:
            hidden |= key > place + right
        weights = scores.masked_fill(hidden.to(scores.device), -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v_doc))
    return torch.cat(outputs).to(q.dtype)


@contextmanager
def running_on(backend: str) -> Iterator[list[dict]]:
    """All attention inside runs on this backend, GPU kernels by their stand-ins; the calls that those got."""
    calls: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        install(patch, calls)
        use_backend(backend)
        try:
            yield calls
        finally:
            use_backend(None)


def install(patch: pytest.MonkeyPatch, calls: list[dict]) -> None:
    """Put the stand-ins in the packages' places; they note their calls."""

    def flash_attn_varlen_func(*args, **options):
        calls.append(options)
        return _flash_attn(*args, **options)

    def varlen_attn(*args, **options):
        calls.append(options)
        return _torch_varlen(*args, **options)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    patch.setitem(sys.modules, "flash_attn", module)
    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


def bind(function: str, args: tuple, options: dict) -> dict:
    """The arguments by name, with defaults; TypeError where a version of the package would raise one."""
    for release in SIGNATURES[function]:
        bound = inspect.Signature([_parameter(entry) for entry in release["parameters"]]).bind(*args, **options)
        bound.apply_defaults()
    assert not args, f"{function} is called by position, and the order differs between versions"
    return bound.arguments


def _parameter(entry: dict) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY if entry.get("keyword_only") else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(entry["name"], kind, default=entry.get("default", inspect.Parameter.empty))


def _flash_attn(*args, **options) -> Tensor:
    # The keywords are those of the signature: bind() has compared them.
    given = bind("flash_attn.flash_attn_varlen_func", args, options)
    q, k, v = given["q"], given["k"], given["v"]
    lengths_q = _lengths(q, given["cu_seqlens_q"], given["max_seqlen_q"])
    lengths_k = _lengths(k, given["cu_seqlens_k"], given["max_seqlen_k"])
    _check_heads(q, k, v)
    assert type(given["deterministic"]) is bool
    assert (given["dropout_p"], given["softcap"], given["alibi_slopes"], given["block_table"]) == (0, 0, None, None)
    left, right = given["window_size"]
    if given["causal"]:
        right = 0
    return reference(q, k, v, lengths_q, lengths_k, scale=given["softmax_scale"], left=left, right=right)


def _torch_varlen(*args, **options) -> Tensor:
    given = bind("torch.nn.attention.varlen.varlen_attn", args, options)
    q, k, v = given["query"], given["key"], given["value"]
    lengths_q = _lengths(q, given["cu_seq_q"], given["max_q"])
    lengths_k = _lengths(k, given["cu_seq_k"], given["max_k"])
    _check_heads(q, k, v)
    assert given["enable_gqa"] or q.shape[1] == k.shape[1]
    assert type(given["window_size"]) is tuple  # varlen_attn compares it with (-1, 0)
    assert given["seqused_k"] is None  # for inference only, as is block_table
    left, right = given["window_size"]
    return reference(q, k, v, lengths_q, lengths_k, scale=given["scale"], left=left, right=right)


def _lengths(x: Tensor, cu_seqlens: Tensor, longest: int) -> list[int]:
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.is_contiguous()
    assert cu_seqlens.device == x.device
    lengths = cu_seqlens.diff().tolist()
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(x)
    assert min(lengths) > 0
    assert type(longest) is int
    assert longest == max(lengths)
    return lengths


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v))
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2]
    assert q.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    assert q.dtype == k.dtype == v.dtype
