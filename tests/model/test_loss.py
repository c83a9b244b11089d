import pytest
import torch
import torch.nn.functional as F

from megablip.model import loss as loss_module
from megablip.model.loss import LossHead, linear_cross_entropy, next_token_loss, row_cross_entropy, row_divergence
from megablip.records import IGNORE_LABEL


def tensors(rows, dtype=torch.float32, vocabulary=37, dim=12):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, dim).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,))


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces of softmax and vocabulary, as at full size; the last ones smaller."""
    monkeypatch.setitem(loss_module._PIECES, "cpu", loss_module._Pieces(37 * 3, 5))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_torch(chunk_rows, with_bias):
    hidden, weight, bias, targets = tensors(23)
    bias = bias if with_bias else None
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    total, per_row = linear_cross_entropy(hidden, weight, torch.arange(23), targets, bias, chunk_rows)
    torch.testing.assert_close(per_row, wanted)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    scale = 0.37
    for got, grad in zip(
        torch.autograd.grad(total * scale, leaves), torch.autograd.grad(wanted.sum() * scale, leaves), strict=True
    ):
        torch.testing.assert_close(got, grad, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
@pytest.mark.parametrize("frozen", [True, False])
def test_rows_carry_their_own_gradients(chunk_rows, frozen):
    hidden, weight, bias, targets = tensors(23)
    weight.requires_grad_(not frozen)
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    per_row = row_cross_entropy(hidden, weight, torch.arange(23), targets, bias, chunk_rows)
    torch.testing.assert_close(per_row, wanted)
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    gradients = (torch.autograd.grad(rows.square().sum(), leaves) for rows in (per_row, wanted))
    for got, grad in zip(*gradients, strict=True):
        torch.testing.assert_close(got, grad, atol=1e-4, rtol=1e-5)


def test_bf16_keeps_the_softmax_and_the_sum_in_float32():
    hidden, weight, bias, targets = tensors(2000, torch.bfloat16)
    total, per_row = linear_cross_entropy(hidden, weight, torch.arange(2000), targets, bias, 64)
    wanted = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    assert total.dtype == per_row.dtype == torch.float32
    torch.testing.assert_close(per_row, wanted)
    got = torch.autograd.grad(total / 3, weight)[0]
    exact = torch.autograd.grad(wanted.sum() / 3, weight)[0]
    assert (got - exact).abs().max() <= 0.01 * exact.abs().max()


def test_masked_rows_are_dropped_and_targets_are_one_place_on():
    hidden, weight, _, _ = tensors(9)
    labels = torch.tensor([IGNORE_LABEL, 5, IGNORE_LABEL, 7, 1, IGNORE_LABEL, IGNORE_LABEL, 2, 3])
    loss = next_token_loss(hidden, weight, labels)
    assert loss.rows.tolist() == [0, 2, 3, 6, 7]
    wanted = F.cross_entropy((hidden @ weight.T)[:-1], labels[1:], reduction="sum", ignore_index=IGNORE_LABEL)
    torch.testing.assert_close(loss.total, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss.total, hidden)[0], torch.autograd.grad(wanted, hidden)[0])


def test_no_label_at_all_gives_zero_with_zero_gradients():
    hidden, weight, bias, _ = tensors(6)
    hidden.data[0] = float("inf")  # must not turn into NaN
    loss = next_token_loss(hidden, weight, torch.full((6,), IGNORE_LABEL), bias)
    assert loss.total.item() == 0.0
    for grad in torch.autograd.grad(loss.total, (hidden, weight, bias)):
        assert grad is not None
        assert not grad.any()


def test_head_gives_logits_or_loss():
    head = LossHead(12, 37)
    hidden, _, _, labels = tensors(9)
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))
    labels[0] = IGNORE_LABEL
    wanted = F.cross_entropy(head(hidden)[:-1], labels[1:], reduction="sum")
    torch.testing.assert_close(head(hidden, labels).total, wanted)
    with torch.no_grad():
        assert not head(hidden, labels).total.requires_grad


def test_a_loss_gives_its_gradients_once():
    head = LossHead(12, 37)
    hidden, _, _, labels = tensors(9)
    loss = head(hidden, labels).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        loss.backward()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, weight, bias, targets = tensors(9)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    wanted = torch.autograd.grad(
        F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum"), leaves[trained]
    )
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    linear_cross_entropy(hidden, weight, torch.arange(9), targets, bias, 4)[0].backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [trained]
    torch.testing.assert_close(leaves[trained].grad, wanted[0], atol=1e-5, rtol=1e-5)


def test_divergence_from_a_reference_is_kl():
    hidden, weight, bias, _ = tensors(23)
    reference, rows = torch.randn(23, 12), torch.tensor([1, 5, 22])
    p, q = (F.log_softmax(F.linear(side[rows], weight, bias), -1) for side in (hidden, reference))
    wanted = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(row_divergence(hidden, reference, weight, rows, bias), wanted)
    assert row_divergence(hidden, hidden, weight, rows, bias).abs().max() == 0
    head = LossHead(12, 37)
    labels = torch.full((23,), IGNORE_LABEL)
    labels[6] = 3
    found = head(hidden, labels, True, reference)
    assert found.divergence.shape == (1,)
    assert not found.divergence.requires_grad
