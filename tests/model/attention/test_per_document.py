"""What only this backend has: two ways for a document, by its length and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megablip.model.attention import per_document as module
from megablip.model.attention import varlen_attention
from megablip.model.packing import PackedLayout
from tests.model.attention.test_interface import compare, inputs, run
from tests.model.stand_ins import reference, running_on


def attend(q, k, v, layout, window=None):
    return varlen_attention(q, k, v, layout_q=layout, layout_k=layout, causal=True, scale=0.3, window=window)


@settings(max_examples=25, deadline=None)
@given(
    doc_lens=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 16, 40]),
)
def test_matrix_products_equal_the_reference_in_float32(doc_lens, heads, window):
    """They serve half precision; here they take the documents up to 50 tokens, and the others go beside them."""
    layout = PackedLayout.from_lengths(doc_lens)
    tensors = inputs(heads, sum(doc_lens))
    with pytest.MonkeyPatch.context() as patch, running_on("per_document"):
        patch.setattr(module, "HALF", (torch.float32,))
        patch.setattr(module, "SHORT_TOKENS", 50)
        ours = run(lambda q, k, v: attend(q, k, v, layout, window), tensors)
    left = -1 if window is None else window - 1
    compare(ours, run(lambda *x: reference(*x, doc_lens, scale=0.3, left=left, right=0), tensors))


def test_bf16_goes_through_the_matrix_products_and_is_close(monkeypatch):
    doc_lens, calls = [5, 70, 31, 600], []
    apply = module._ShortDocumentAttention.apply
    monkeypatch.setattr(module._ShortDocumentAttention, "apply", lambda *a: calls.append(a[3].documents) or apply(*a))
    layout = PackedLayout.from_lengths(doc_lens)
    tensors = inputs((4, 2), sum(doc_lens), dtype=torch.bfloat16)
    with running_on("per_document"):
        ours = run(lambda q, k, v: attend(q, k, v, layout), tensors)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    for got, wanted in zip(ours, run(lambda *x: reference(*x, doc_lens, scale=0.3, right=0), exact), strict=True):
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert calls == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_values_next_door_change_nothing(dtype):
    layout = PackedLayout.from_lengths([9, 40, 12])
    q, k, v = (x.detach().transpose(0, 1) for x in inputs((4, 4), 61, dtype=dtype))
    with running_on("per_document"):
        before = attend(q, k, v, layout)
        for x in (q, k, v):
            x[9:49] = 1e4
        after = attend(q, k, v, layout)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[49:], after[49:])
    assert not torch.equal(before[9:49], after[9:49])
