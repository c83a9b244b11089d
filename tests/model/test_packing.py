import numpy as np
import pytest
import torch

from megablip.model.packing import PackedLayout, Padding, VisibleKeys

CPU = torch.device("cpu")


def test_a_layout_says_all_in_python_numbers_and_int32():
    layout = PackedLayout.from_lengths([3, 1, 5])
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert layout.cu_seqlens.dtype == torch.int32
    assert type(layout.max_seqlen) is int
    assert layout.max_seqlen == 5
    assert layout.document_index.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert not layout.is_even
    assert PackedLayout.from_lengths([4, 4]).is_even


def test_padding_lays_documents_into_a_batch_with_the_gradient_of_each_row_once():
    padding = Padding.of_lengths([3, 1, 2], CPU)
    x = torch.arange(6.0)[:, None].requires_grad_()
    batch = padding.rows.take(x).view(3, 3)
    assert batch.tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert padding.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    batch.backward(torch.arange(9.0).view(3, 3))
    assert x.grad.flatten().tolist() == [0, 1, 2, 3, 6, 7]


def test_visible_keys_are_taken_and_the_others_get_no_gradient():
    visible = torch.tensor([[True, False, True, True], [False, False, True, True]])
    keys = VisibleKeys.from_mask(visible.numpy(), queries=2, device=CPU)
    assert keys.queries.doc_lens == [2, 2]
    assert keys.keys.doc_lens == [3, 2]
    x = torch.arange(8.0).view(2, 4, 1).requires_grad_()
    taken = keys.take(x)
    assert taken.flatten().tolist() == [0, 2, 3, 6, 7]
    taken.backward(torch.tensor([[1.0], [2], [3], [4], [5]]))
    assert x.grad.flatten().tolist() == [1, 0, 2, 3, 0, 0, 4, 5]


def test_no_index_waits_for_a_gpu(monkeypatch):
    """Those from memory that is not pinned once did, between tower and decoder of each micro-batch."""
    copied, pinned = torch.Tensor.to, []

    def to(tensor, device, non_blocking=False):
        assert (torch.device(device).type, non_blocking) == ("cuda", True)
        assert pinned.pop() is tensor
        return copied(tensor, "cpu")

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda", 0)
    VisibleKeys.from_mask(np.array([[True, False], [True, True]]), queries=1, device=gpu)
    Padding.of_lengths([3, 1], gpu)


def test_where_all_keys_are_seen_nothing_is_gathered():
    keys = VisibleKeys.from_mask(np.ones((2, 4), bool), queries=1, device=CPU)
    x = torch.randn(2, 4, 3)
    assert keys.rows is None
    assert keys.take(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_taking_rows_has_the_gradient_of_an_index(kind):
    x = torch.randn(2, 4, 3, dtype=kind, requires_grad=True)
    visible = torch.tensor([[True, False, True, True], [False, False, True, True]])
    out = VisibleKeys.from_mask(visible.numpy(), queries=2, device=CPU).take(x)
    weights = torch.randn_like(out)
    (mine,) = torch.autograd.grad(out, x, weights)
    (theirs,) = torch.autograd.grad(x[visible], x, weights)
    assert torch.equal(out, x[visible])
    assert torch.equal(mine, theirs)
