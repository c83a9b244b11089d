"""The loss head against logits of all rows: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megablip.doctor.result import Place, Result, median_seconds, peak_memory, relative_error
from megablip.model.loss import next_token_loss
from megablip.records import IGNORE_LABEL


@dataclass(frozen=True)
class _Sizes:
    tokens: int
    hidden: int
    vocabulary: int


FULL = _Sizes(tokens=4096, hidden=3072, vocabulary=32064)  # Phi-3-mini
SMALL = _Sizes(tokens=256, hidden=64, vocabulary=512)
# So many ids that the head cuts even few rows into chunks: 128 rows are one.
SMALL_MEMORY = _Sizes(tokens=272, hidden=16, vocabulary=131072)

_NAMES = ("loss", "hidden states", "weight", "bias")


def check(place: Place) -> Iterator[Result]:
    sizes = SMALL if place.small else FULL
    inputs, labels = _inputs(sizes, place.device)
    exact = _with_gradients(_plain_loss, inputs, labels)
    for dtype, floor in ((torch.float32, 2e-5), (torch.bfloat16, 0.0)):
        rounded = [x.to(dtype) for x in inputs]
        expected = (
            exact if dtype == torch.float32 else _with_gradients(_plain_loss, [x.float() for x in rounded], labels)
        )
        plain = _with_gradients(_plain_loss, rounded, labels)
        found = _with_gradients(_head_loss, rounded, labels)
        for name, ours, theirs, right in zip(_NAMES, found, plain, expected, strict=True):
            yield Result(
                f"{_short(dtype)}: {'loss' if name == 'loss' else f'gradient of the {name}'}",
                "relative error against float32; tolerance: three times that of cross_entropy over all logits",
                relative_error(ours, right),
                tolerance=max(3 * relative_error(theirs, right), floor),
                remedy="don't train: report this with doctor.json",
            )
    nothing = torch.full_like(labels, IGNORE_LABEL)
    found = _with_gradients(_head_loss, [x.bfloat16() for x in inputs], nothing)
    yield Result(
        "no label: loss and gradients", "largest absolute value; a batch without labels must change nothing",
        max(float(x.abs().max()) for x in found), tolerance=0.0,
    )  # fmt: skip

    yield from _memory(place, SMALL_MEMORY if place.small else FULL)
    rounded = [x.bfloat16() for x in inputs]
    seconds, plain_seconds = (
        median_seconds(place, lambda loss=loss: _with_gradients(loss, rounded, labels), repeats=5)
        for loss in (_head_loss, _plain_loss)
    )
    yield Result("time", "share of that of cross_entropy over all logits", seconds / plain_seconds)


def _memory(place: Place, sizes: _Sizes) -> Iterator[Result]:
    longer = _Sizes(4 * sizes.tokens, sizes.hidden, sizes.vocabulary)
    peak, longer_peak = (_peak(place, some, _head_loss) for some in (sizes, longer))
    yield Result(
        "memory of one more token", "bytes for each element of its hidden state, from T to 4 T tokens; no logits",
        (longer_peak - peak) / (3 * sizes.tokens) / sizes.hidden, "bytes", tolerance=16.0,
        remedy="loss and head hold the logits of a whole sequence: report this with doctor.json",
    )  # fmt: skip
    yield Result(
        "peak memory", "share of that of cross_entropy over all logits", peak / _peak(place, sizes, _plain_loss)
    )


def _inputs(sizes: _Sizes, device: torch.device, masked_share: float = 0.6) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias in float32, and labels."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    hidden, weight = normal(sizes.tokens, sizes.hidden), normal(sizes.vocabulary, sizes.hidden, scale=0.05)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator, device=device)
    masked = torch.rand(sizes.tokens, generator=generator, device=device) < masked_share
    return [hidden, weight, normal(sizes.vocabulary)], labels.masked_fill_(masked, IGNORE_LABEL)


def _head_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(hidden, weight, labels, bias).total


def _plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden[:-1], weight, bias).float()
    return F.cross_entropy(logits, labels[1:], ignore_index=IGNORE_LABEL, reduction="sum")


def _with_gradients(loss, inputs: list[Tensor], labels: Tensor) -> list[Tensor]:
    """The mean loss, and its gradients to the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, labels) / max(int((labels[1:] != IGNORE_LABEL).sum()), 1)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _peak(place: Place, sizes: _Sizes, loss) -> int:
    inputs, labels = _inputs(sizes, place.device, masked_share=0.0)
    inputs = [x.bfloat16() for x in inputs]
    with peak_memory(place) as peak:
        _with_gradients(loss, inputs, labels)
    return peak.bytes


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
