"""Token cross entropy from hidden states, without the logits of a whole sequence.

The head's product, the softmax and all gradients are computed chunk by chunk in
the forward (the algorithm of Liger-Kernel, arXiv 2410.10989, section 3.2), so
memory doesn't grow with the sequence.  Rows without a label are dropped first:
image and prompt tokens are half to nine tenths of a vision-language batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablip.records import IGNORE_LABEL

# Logits of one chunk: 2**24 float32 values are 64 MiB.
_CHUNK_ELEMENTS = 2**24


class TokenLoss(NamedTuple):
    """Cross entropy of the rows that have a label."""

    total: Tensor  # float32 scalar, the sum over rows; carries the gradient
    per_row: Tensor  # float32[valid]; detached, or carries a gradient of its own
    rows: Tensor  # int64[valid], the place of each row in `hidden`


class LossHead(nn.Linear):
    """A decoder's output head, which can also go straight to the loss.

    Both ways read the weight inside this module's forward, so ZeRO-3 gathers it
    once per call, however many chunks the loss takes.

        head(hidden)          -> logits [..., vocabulary]
        head(hidden, labels)  -> TokenLoss, for hidden [T, d] and labels [T]
        head(hidden, labels, by_row=True)  -> the same, where each row's loss carries its gradient
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, by_row: bool = False) -> Tensor | TokenLoss:
        if labels is None:
            return super().forward(hidden)
        return next_token_loss(hidden, self.weight, labels, self.bias, by_row)


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, by_row: bool = False
) -> TokenLoss:
    """Summed loss of predicting `labels[i + 1]` from `hidden[i]`.

    A row's target is the label one place on, across documents too: that is
    right because the first label of each document is IGNORE_LABEL.

    Args:
        hidden: [T, d].
        weight, bias: of the head, [vocabulary, d] and [vocabulary].
        labels: int64[T], aligned with the input ids, IGNORE_LABEL where there is no loss.
        by_row: see row_cross_entropy.
    """
    rows = (labels[1:] != IGNORE_LABEL).nonzero().squeeze(1)
    inputs, targets = hidden.index_select(0, rows), labels[1:].index_select(0, rows)
    if by_row:
        per_row = row_cross_entropy(inputs, weight, targets, bias)
        return TokenLoss(per_row.sum(), per_row, rows)
    total, per_row = linear_cross_entropy(inputs, weight, targets, bias)
    return TokenLoss(total, per_row, rows)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and rows of `cross_entropy(hidden @ weight.T + bias, targets)`, softmax in float32.

    Zero rows are allowed: the sum is 0 and all gradients are exactly zero.

    Args:
        hidden: [N, d].
        targets: int64[N], each a valid id.
        chunk_rows: rows whose logits are held at once; by default about 64 MiB of them.

    Returns:
        The float32 sum, differentiable, and float32[N] losses, detached.
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, chunk_rows or _chunk_rows(weight), torch.is_grad_enabled()
    )


def _chunk_rows(weight: Tensor) -> int:
    return max(128, _CHUNK_ELEMENTS // weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_rows, grad_enabled):
        need_hidden, need_weight, need_bias = (needed and grad_enabled for needed in ctx.needs_input_grad[:3])
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Chunks add up in float32; one bf16 chunk after another would round away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            inputs, target = hidden[rows], targets[rows].unsqueeze(1)
            log_probs = F.log_softmax(F.linear(inputs, weight, bias), dim=-1, dtype=torch.float32)
            losses[rows] = -log_probs.gather(1, target).squeeze(1)
            if not (need_hidden or need_weight or need_bias):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            if need_bias:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if need_weight:
                grad_weight += grad_logits.t() @ inputs
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_total, _):
        # In float32: the factor 1 / (valid tokens), rounded to bf16, would bias every gradient alike.
        grads = (None if grad is None else (grad.float() * grad_total).to(ctx.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def row_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk_rows: int | None = None
) -> Tensor:
    """float32[N] of `cross_entropy(hidden @ weight.T + bias, targets, reduction="none")`, softmax in float32.

    For losses that weigh rows by what comes out, such as DPO's.  The backward
    computes each chunk's logits again, so memory doesn't grow with N here either.
    """
    return _RowCrossEntropy.apply(hidden, weight, bias, targets, chunk_rows or _chunk_rows(weight))


class _RowCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_rows):
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias).float()
            losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk_rows = chunk_rows
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            inputs, target = hidden[rows], targets[rows].unsqueeze(1)
            grad_logits = F.linear(inputs, weight, bias).float().softmax(-1)
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits.mul_(grad_losses[rows].unsqueeze(1))
            if need_bias:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if need_weight:
                grad_weight += grad_logits.t() @ inputs
        grads = (None if grad is None else grad.to(weight.dtype) for grad in (grad_hidden, grad_weight, grad_bias))
        return (*grads, None, None)
