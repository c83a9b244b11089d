"""Token cross entropy from hidden states, without the logits of a whole sequence.

The head's product, the softmax and all gradients are computed chunk by chunk in
the forward (the algorithm of Liger-Kernel, arXiv 2410.10989, section 3.2), so
memory doesn't grow with the sequence.  Rows without a label are dropped first:
image and prompt tokens are half to nine tenths of a vision-language batch.

What is not a matrix product goes in pieces that stay in a CPU's cache: the
softmax a few rows at a time, in place of the logits; the gradient of the weight
some rows of the vocabulary at a time.  On two CPU cores that made the softmax
four times as fast, and adding chunks up in float32 free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablip.records import IGNORE_LABEL

_CHUNK_BYTES = 2**26
"""Logits of one chunk, in the precision of the weights."""


class _Pieces(NamedTuple):
    softmax_elements: int  # whose softmax is in memory at once, in float32
    vocabulary_rows: int  # of the weight's gradient that are computed at once


_PIECES = {"cpu": _Pieces(2**20, 1024)}
_LARGE_PIECES = _Pieces(2**24, 8192)  # where each piece is a kernel to launch


class TokenLoss(NamedTuple):
    """Cross entropy of the rows that have a label."""

    total: Tensor  # float32 scalar, the sum over rows; carries the gradient
    per_row: Tensor  # float32[valid]; detached, or carries a gradient of its own
    rows: Tensor  # int64[valid], the place of each row in `hidden`
    divergence: Tensor | None = None  # float32[valid], detached: KL(this model || reference) of the next token


class LossHead(nn.Linear):
    """A decoder's output head, which can also go straight to the loss.

    Both ways read the weight inside this module's forward, so ZeRO-3 gathers it
    once per call, however many chunks the loss takes.

        head(hidden)          -> logits [..., vocabulary]
        head(hidden, labels)  -> TokenLoss, for hidden [T, d] and labels [T]
        head(hidden, labels, by_row=True)  -> the same, where each row's loss carries its gradient

    `reference`, another model's hidden states for the same head, adds how far this one is from it.
    """

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        by_row: bool = False,
        reference: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        if labels is None:
            return super().forward(hidden)
        found = next_token_loss(hidden, self.weight, labels, self.bias, by_row)
        if reference is None:
            return found
        return found._replace(divergence=row_divergence(hidden, reference, self.weight, found.rows, self.bias))


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
    targets = labels[1:].index_select(0, rows)
    if by_row:
        per_row = row_cross_entropy(hidden, weight, rows, targets, bias)
        return TokenLoss(per_row.sum(), per_row, rows)
    total, per_row = linear_cross_entropy(hidden, weight, rows, targets, bias)
    return TokenLoss(total, per_row, rows)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum and rows of `cross_entropy(hidden[rows] @ weight.T + bias, targets)`, softmax in float32.

    No row at all is allowed: the sum is 0 and all gradients are exactly zero.

    Args:
        hidden: [T, d].
        rows: int64[N], each at most once.
        targets: int64[N], each a valid id.
        chunk_rows: rows whose logits are held at once; by default 64 MiB of them.

    Returns:
        The float32 sum, differentiable once, and float32[N] losses, detached.
    """
    chunk_rows = chunk_rows or _chunk_rows(weight)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, chunk_rows, torch.is_grad_enabled())


def _chunk_rows(weight: Tensor) -> int:
    return max(128, _CHUNK_BYTES // (weight.shape[0] * weight.element_size()))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, chunk_rows, grad_enabled):
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        losses, *gradients = _chunk_by_chunk(hidden, weight, bias, targets, rows, chunk_rows, needs)
        # Not by save_for_backward, which would keep all of it to the end of the backward.
        ctx.gradients, ctx.dtype = gradients, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_total, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss are kept for one backward only")
        (grad_hidden, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        if grad_weight is not None:
            grad_weight = grad_weight.scaled(grad_total)
        if grad_hidden is not None:
            _scale(grad_hidden, grad_total, out=grad_hidden)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(ctx.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def row_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """float32[N] of `cross_entropy(hidden[rows] @ weight.T + bias, targets, reduction="none")`, softmax in float32.

    For losses that weigh rows by what comes out, such as DPO's.  The backward
    computes each chunk's logits again, so memory doesn't grow with N here either.
    Arguments are those of `linear_cross_entropy`.
    """
    return _RowCrossEntropy.apply(hidden, weight, bias, targets, rows, chunk_rows or _chunk_rows(weight))


class _RowCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, chunk_rows):
        ctx.save_for_backward(hidden, weight, bias, targets, rows)
        ctx.chunk_rows = chunk_rows
        return _chunk_by_chunk(hidden, weight, bias, targets, rows, chunk_rows, needs=(False, False, False))[0]

    @staticmethod
    def backward(ctx, grad_losses):
        needs = ctx.needs_input_grad[:3]
        _, grad_hidden, grad_weight, grad_bias = _chunk_by_chunk(*ctx.saved_tensors, ctx.chunk_rows, needs, grad_losses)
        if grad_weight is not None:
            grad_weight = grad_weight.scaled(grad_losses.new_ones(()))
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.saved_tensors[1].dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunk_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    chunk_rows: int,
    needs: Sequence[bool],
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, _WeightGradient | None, Tensor | None]:
    """Losses of the rows; and the gradients of their sum for hidden, weight and bias, as far as `needs` says.

    Args:
        factors: float32[N], weights of the rows in that sum.
    """
    need_hidden, need_weight, need_bias = needs
    pieces = _PIECES.get(hidden.device.type, _LARGE_PIECES)
    losses = hidden.new_empty(len(rows), dtype=torch.float32)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else None
    grad_weight = _WeightGradient(weight, len(rows) <= chunk_rows, pieces.vocabulary_rows) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        inputs = hidden.index_select(0, rows[chunk])
        logits = F.linear(inputs, weight, bias)
        factor = factors[chunk] if factors is not None else None
        piece_rows = max(1, pieces.softmax_elements // logits.shape[1])
        _softmax(logits, targets[chunk], losses[chunk], piece_rows, any(needs), factor, grad_bias)
        if need_hidden:
            grad_hidden.index_copy_(0, rows[chunk], logits @ weight)
        if need_weight:
            grad_weight.add(logits, inputs)
        del logits  # before those of the next chunk are made
    return losses, grad_hidden, grad_weight, grad_bias


def _softmax(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    piece_rows: int,
    with_gradient: bool,
    factors: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fill in the losses; put the gradient in the place of the logits, and add that of the bias up."""
    for start in range(0, len(logits), piece_rows):
        piece = slice(start, start + piece_rows)
        target = targets[piece].unsqueeze(1)
        log_probs = F.log_softmax(logits[piece], dim=-1, dtype=torch.float32)
        losses[piece] = -log_probs.gather(1, target).squeeze(1)
        if not with_gradient:
            continue
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        if factors is not None:
            gradient.mul_(factors[piece].unsqueeze(1))
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
        logits[piece] = gradient


class _WeightGradient:
    """The sum of chunks' gradients of the weight, in blocks of the vocabulary that are freed one by one.

    In float32: one bf16 chunk after another would round away.  A single chunk's is in the weight's precision.
    """

    def __init__(self, weight: Tensor, one_chunk: bool, piece_rows: int):
        self._shape, self._dtype, self._piece_rows = weight.shape, weight.dtype, piece_rows
        dtype = weight.dtype if one_chunk else torch.float32
        self._blocks = [torch.empty_like(block, dtype=dtype) for block in weight.split(4 * piece_rows)]
        self._filled = False

    def add(self, grad_logits: Tensor, inputs: Tensor) -> None:
        pieces = [piece for block in self._blocks for piece in block.split(self._piece_rows)]
        for piece, grads in zip(pieces, grad_logits.split(self._piece_rows, dim=1), strict=True):
            if self._filled:
                piece += grads.t() @ inputs
            else:
                piece.copy_(grads.t() @ inputs)
        self._filled = True

    def scaled(self, factor: Tensor) -> Tensor:
        """The whole times `factor`; for once, as it takes the sum apart."""
        if not self._filled:
            return factor.new_zeros(self._shape, dtype=self._dtype)
        whole = factor.new_empty(self._shape, dtype=self._dtype)
        for part in whole.split([len(block) for block in self._blocks]):
            _scale(self._blocks.pop(0), factor, out=part)
        return whole


def _scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    # In float32: the factor 1 / (valid tokens), rounded to bf16, would bias every gradient alike.
    out.copy_(gradient.float() * factor)


@torch.no_grad()
def row_divergence(
    hidden: Tensor, reference: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None = None
) -> Tensor:
    """float32[N]: KL(p || q) of the next token at `rows`, p by `hidden` and q by `reference`, both [T, d]."""
    found = hidden.new_empty(len(rows), dtype=torch.float32)
    chunk_rows = _chunk_rows(weight) // 4  # four times as much is held: both sides, in float32
    for start in range(0, len(rows), chunk_rows):
        part = rows[start : start + chunk_rows]
        p, q = (
            F.log_softmax(F.linear(side.index_select(0, part), weight, bias), dim=-1, dtype=torch.float32)
            for side in (hidden, reference)
        )
        found[start : start + chunk_rows] = (p.exp() * (p - q)).sum(-1)
    return found
