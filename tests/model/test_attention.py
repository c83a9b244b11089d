import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from megablip.model import attention
from megablip.model.attention import dense_attention, select_backend, varlen_attention
from megablip.model.packing import PackedLayout
from tests.model.tiny import tiny_model

DIM = 8


def reference(q, k, v, doc_lens, *, window=None, causal=True, scale=0.3):
    """Dense attention with the block-diagonal mask, in float32."""
    tokens = sum(doc_lens)
    document = torch.arange(len(doc_lens)).repeat_interleave(torch.tensor(doc_lens))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = document[:, None] == document
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def inputs(tokens, heads, kv_heads, dtype=torch.float32):
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, DIM).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def run(function, tensors):
    """Output and gradients, under a fixed random cotangent."""
    out = function(*tensors)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, tensors, cotangent.to(out.dtype))
    return [x.detach().float() for x in (out, *grads)]


@settings(max_examples=25, deadline=None)
@given(
    doc_lens=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 16, 40]),
    short=st.booleans(),
)
def test_equals_dense_reference(doc_lens, heads, window, short):
    layout = PackedLayout.from_lengths(doc_lens)
    tensors = inputs(sum(doc_lens), *heads)
    # In float32 the matrix products serve no document, so send some of them there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_HALF", (torch.float32,) if short else ())
        patch.setattr(attention, "_SHORT_TOKENS", 50)
        ours = run(
            lambda q, k, v: varlen_attention(q, k, v, layout=layout, causal=True, scale=0.3, window=window), tensors
        )
    for got, wanted in zip(
        ours, run(lambda q, k, v: reference(q, k, v, doc_lens, window=window), tensors), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def test_bf16_goes_through_the_matrix_products_and_is_close(monkeypatch):
    doc_lens = [5, 70, 31, 600]
    calls = []
    apply = attention._ShortDocumentAttention.apply
    monkeypatch.setattr(
        attention._ShortDocumentAttention, "apply", lambda *a: calls.append(a[3].documents) or apply(*a)
    )
    layout = PackedLayout.from_lengths(doc_lens)
    tensors = inputs(sum(doc_lens), 4, 2, torch.bfloat16)
    ours = run(lambda q, k, v: varlen_attention(q, k, v, layout=layout, causal=True, scale=0.3), tensors)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    for got, wanted in zip(ours, run(lambda q, k, v: reference(q, k, v, doc_lens), exact), strict=True):
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert calls == [[0, 1, 2]]


def test_not_causal():
    doc_lens = [7, 20]
    tensors = inputs(27, 2, 2)
    layout = PackedLayout.from_lengths(doc_lens)
    ours = run(lambda q, k, v: varlen_attention(q, k, v, layout=layout, causal=False, scale=0.3), tensors)
    for got, wanted in zip(ours, run(lambda q, k, v: reference(q, k, v, doc_lens, causal=False), tensors), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_another_document(dtype):
    """Infinities next door change nothing, not even through zeros."""
    layout = PackedLayout.from_lengths([9, 40, 12])
    q, k, v = (x.detach() for x in inputs(61, 4, 4, dtype))
    before = varlen_attention(q, k, v, layout=layout, causal=True, scale=0.3)
    for x in (q, k, v):
        x[9:49] = 1e4
    after = varlen_attention(q, k, v, layout=layout, causal=True, scale=0.3)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[49:], after[49:])
    assert not torch.equal(before[9:49], after[9:49])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention_with_mask(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, DIM, dtype=dtype) for n in (4, 11, 11))
    mask = torch.rand(2, 1, 1, 11) < 0.5
    mask[..., -1] = True
    ours = dense_attention(q, k, v, scale=0.3, mask=mask)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=0.3)
    torch.testing.assert_close(ours.float(), exact, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=2e-2)


# flash-attn 2.8.3, flash_attn/flash_attn_interface.py.
def _flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert all(x.is_contiguous() for x in (q, k, v))
    doc_lens = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(doc_lens)
    window = None if window_size[0] < 0 else window_size[0] + 1  # its left side leaves out the token itself
    return reference(q, k, v, doc_lens, window=window, causal=causal, scale=softmax_scale)


def _stand_in_for_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    inspect.signature(varlen_attn).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    left, right = options["window_size"]
    return _flash_attn_2(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        softmax_scale=options["scale"],
        causal=right == 0,
        window_size=(left, right),
    )


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_gpu_adapters_keep_the_contract(monkeypatch, backend, window, heads):
    """Against stand-ins that take the packages' arguments and compute the reference."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=_flash_attn_2))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _stand_in_for_torch)
    layout = PackedLayout.from_lengths([13, 4])
    # As transformers hands them over: transposed views.
    q, k, v = (torch.randn(n, 17, DIM).transpose(0, 1) for n in (heads[0], heads[1], heads[1]))
    out = attention._BACKENDS[backend](q, k, v, layout=layout, causal=True, scale=0.2, window=window)
    torch.testing.assert_close(out, reference(q, k, v, [13, 4], window=window, scale=0.2))


@pytest.mark.parametrize("wanted", [False, True])
def test_flash_attn_is_told_of_deterministic_mode(monkeypatch, wanted):
    told = []

    def kernel(q, *, deterministic, **options):
        told.append(deterministic)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=kernel))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    q = torch.randn(4, 2, DIM)
    attention._BACKENDS["flash_attn"](
        q, q, q, layout=PackedLayout.from_lengths([4]), causal=True, scale=1.0, window=None
    )
    assert told == [wanted]


def test_backends_are_chosen_with_a_reason(monkeypatch):
    select_backend.cache_clear()
    assert select_backend("cpu", torch.bfloat16).name == "per_document"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert select_backend("cuda", torch.bfloat16).name == "torch_varlen"
    assert select_backend("cuda", torch.float32).name == "per_document"
    select_backend.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert select_backend("cuda", torch.bfloat16).name == "flash_attn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    select_backend.cache_clear()
    assert "8.0" in select_backend("cuda", torch.bfloat16).reason
    select_backend.cache_clear()


def test_documents_told_apart_by_position_ids_alone_are_isolated_too():
    """transformers' own convention for packs, without `packing`: as under its SDPA."""
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    together = model.decoder(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = model.decoder(input_ids=ids[:, 3:], use_cache=False).logits
    torch.testing.assert_close(together[:, 3:], alone, rtol=1e-5, atol=1e-5)
