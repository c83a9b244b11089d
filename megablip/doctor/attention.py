"""Each attention backend that can run here against plain matrix products in float32: values, gradients, leakage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from megablip.doctor.result import Place, Result, median_seconds, relative_error
from megablip.errors import ConfigError
from megablip.model.attention import select_backend, use_backend, varlen_attention
from megablip.model.attention.select import Name
from megablip.model.packing import PackedLayout

REMEDY = "don't train with it: set model.attention to another one, and report this with doctor.json"


@dataclass(frozen=True)
class Case:
    """What attention is asked for; `key_lens` None: self-attention, causal."""

    name: str
    heads: int
    kv_heads: int
    size: int
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...] | None = None
    window: int | None = None

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        rows = sum(self.query_lens), *[sum(self.key_lens or self.query_lens)] * 2
        heads = self.heads, self.kv_heads, self.kv_heads
        return tuple(
            torch.randn(n, h, self.size, device=device, dtype=dtype, generator=generator)
            for n, h in zip(rows, heads, strict=True)
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By the backend in use."""
        layout = PackedLayout.from_lengths(list(self.query_lens), q.device)
        layout_k = PackedLayout.from_lengths(list(self.key_lens), q.device) if self.key_lens else layout
        return varlen_attention(
            q, k, v, layout_q=layout, layout_k=layout_k, causal=self.key_lens is None, window=self.window
        )

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The definition, document by document, in the precision of the inputs."""
        key_lens, groups, outputs = self.key_lens or self.query_lens, self.heads // self.kv_heads, []
        for q_d, k_d, v_d in zip(q.split(self.query_lens), k.split(key_lens), v.split(key_lens), strict=True):
            k_d, v_d = (x.repeat_interleave(groups, dim=1) for x in (k_d, v_d))
            scores = torch.einsum("qhd,khd->hqk", q_d, k_d) * self.size**-0.5
            if self.key_lens is None:
                place = torch.arange(len(q_d), device=q.device)
                distance = place[:, None] - place
                hidden = (distance < 0) | (distance >= (self.window or len(q_d)))
                scores = scores.masked_fill(hidden, float("-inf"))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_d))
        return torch.cat(outputs)


FULL = (
    Case("Phi-3, 8 documents", 32, 32, 96, (700, 31, 256, 1, 129, 380, 64, 487)),
    Case("Phi-3, window 2047, a document of 3000", 32, 32, 96, (3000, 500), window=2047),
    Case("grouped queries, head size 128", 32, 8, 128, (513, 64, 900)),
    Case("head size 64", 16, 4, 64, (300, 212)),
    Case("resampler, 12 tiles", 16, 16, 96, (128,) * 12, (857,) * 12),
    Case("tower, head size 72", 16, 16, 72, (729,) * 4, (729,) * 4),
)
SMALL = (
    Case("Phi-3, 4 documents", 2, 2, 24, (70, 3, 1, 26)),
    Case("window 7, a document of 30", 2, 2, 24, (30, 5), window=7),
    Case("grouped queries, head size 32", 4, 2, 32, (33, 20)),
    Case("resampler, 3 tiles", 2, 2, 24, (4,) * 3, (29,) * 3),
)


def check(place: Place) -> Iterator[Result]:
    cases = SMALL if place.small else FULL
    yield Result("chosen for bf16", str(select_backend(place.device.type, torch.bfloat16)))
    for name in get_args(Name):
        for dtype in (torch.bfloat16, torch.float32):
            of = f"{name}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            try:
                kernel = select_backend(place.device.type, dtype, tuple({case.size for case in cases}), name).kernel
            except ConfigError as error:
                yield Result(of, f"not run: {error.what}")
                continue
            yield Result(of, f"kernel: {kernel}")
            use_backend(name)
            try:
                for case in cases:
                    yield from _values(of, case, place, dtype)
                for compare in (_leakage, _repeats, _speed):
                    yield compare(of, cases[0], place, dtype)
            except Exception as error:
                yield Result.crash(of, error)
            finally:
                use_backend(None)


def _values(of: str, case: Case, place: Place, dtype: torch.dtype) -> Iterator[Result]:
    inputs = case.inputs(place.device, dtype)
    found = _with_gradients(case.run, inputs)
    plain = _with_gradients(case.plain, inputs)
    exact = plain if dtype == torch.float32 else _with_gradients(case.plain, tuple(x.float() for x in inputs))
    worst = [relative_error(ours, right) for ours, right in zip(found, exact, strict=True)]
    # What rounding to bf16 costs the definition itself; float32 is compared with itself.
    allowed = [relative_error(theirs, right) for theirs, right in zip(plain, exact, strict=True)]
    for name, error, rounding in (("output", worst[0], allowed[0]), ("gradients", max(worst[1:]), max(allowed[1:]))):
        yield Result(
            f"{of}: {name}: {case.name}", "relative error against float32; tolerance: 3 x that of matrix products",
            error, tolerance=max(3 * rounding, 2e-5), remedy=REMEDY,
        )  # fmt: skip


def _leakage(of: str, case: Case, place: Place, dtype: torch.dtype) -> Result:
    """Random packs: change a document, and see what moves of the others; ask their loss for its gradients there."""
    worst, longest, rng = 0.0, max(case.query_lens), np.random.default_rng(0)
    for seed in range(5 if place.small else 50):
        lengths = tuple(rng.integers(1, longest, len(case.query_lens)).tolist())
        case = replace(case, query_lens=lengths)
        changed = seed % len(lengths)
        inside = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) == changed
        inside = inside.to(place.device)
        inputs, other = (case.inputs(place.device, dtype, number) for number in (seed, seed + 1000))
        mixed = [torch.where(inside[:, None, None], b, a) for a, b in zip(inputs, other, strict=True)]
        outputs = [case.run(*(x.requires_grad_() for x in leaves)) for leaves in (inputs, mixed)]
        moved = (outputs[0] - outputs[1]).detach()[~inside].abs().max()
        gradients = torch.autograd.grad(outputs[1][~inside].float().sum(), mixed)
        worst = max(worst, float(moved), *(float(x[inside].abs().max()) for x in gradients))
    return Result(
        f"{of}: leakage", "one document changes: largest change of others' outputs, or gradient from them to it",
        worst, tolerance=1e-6, remedy=REMEDY,
    )  # fmt: skip


def _repeats(of: str, case: Case, place: Place, dtype: torch.dtype) -> Result:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        inputs = case.inputs(place.device, dtype)
        first, *others = (_with_gradients(case.run, inputs) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(before)
    differing = sum(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return Result(
        f"{of}: deterministic mode", "tensors that differ in a bit, of output and gradients of 4 runs",
        differing, tolerance=0, remedy="a resumed run will not be bit-exact with it",
    )  # fmt: skip


def _speed(of: str, case: Case, place: Place, dtype: torch.dtype) -> Result:
    inputs = case.inputs(place.device, dtype)
    seconds = median_seconds(place, lambda: _with_gradients(case.run, inputs), repeats=5)
    return Result(f"{of}: time", f"forward and backward: {case.name}", seconds * 1e3, "ms")


def _with_gradients(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs each of its elements differently."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]
