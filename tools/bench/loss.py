"""The loss head, forward and backward in bf16, beside its usual form: all logits in float32, then cross entropy.

Hidden size and vocabulary are Phi-3-mini's.  Peak memory is the high-water mark of
a process of its own (VmHWM) above the one before the call, when weight and hidden
states are there; everything that the call makes counts, gradients too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from megablip.model.loss import LossHead
from megablip.records import IGNORE_LABEL
from tools.bench.core import Rival, Row, median_seconds
from tools.bench.step import all_threads

HIDDEN, VOCABULARY = 3072, 32064
TOKENS, MANY_TOKENS = 2048, 6144
MASKED = 0.6


def rows() -> list[Row]:
    with all_threads():
        return [
            *time_rows("unmasked", masked=0.0, goal=1.0),
            *time_rows("masked", masked=MASKED, goal=2.0),
            *memory_rows(),
        ]


def time_rows(name: str, masked: float, goal: float) -> list[Row]:
    run = make(TOKENS, masked)
    (ours, our_gradients), (theirs, their_gradients) = (run(form) for form in FORMS.values())
    gradient_error = max(
        float((mine.float() - other.float()).norm() / other.float().norm())
        for mine, other in zip(our_gradients, their_gradients, strict=True)
    )
    del our_gradients, their_gradients
    seconds = median_seconds({side: partial(run, form) for side, form in FORMS.items()})
    return [
        Row(name, seconds["ours"] * 1e3, "ms", "lower", goal, Rival("usual form", seconds["usual"] * 1e3)),
        Row(f"{name}_loss_error", abs(float(ours / theirs) - 1), "", "lower", goal=1e-5),
        Row(f"{name}_gradient_error", gradient_error, "", "lower", goal=0.01),  # rounding to bf16
    ]


def memory_rows() -> list[Row]:
    peaks = {(side, tokens): peak_mib(side, tokens) for tokens in (TOKENS, MANY_TOKENS) for side in FORMS}
    return [
        *(
            Row(
                f"peak_{tokens}", peaks["ours", tokens], "MiB", "lower",
                goal={TOKENS: 1.0, MANY_TOKENS: 4.0}[tokens], rival=Rival("usual form", peaks["usual", tokens]),
            )
            for tokens in (TOKENS, MANY_TOKENS)
        ),
        Row("peak_growth", peaks["ours", MANY_TOKENS] / peaks["ours", TOKENS], "x", "lower", goal=1.5),
    ]  # fmt: skip


def make(tokens: int, masked: float) -> Callable:
    """What runs one of FORMS on one head and the same hidden states."""
    torch.manual_seed(0)
    head = LossHead(HIDDEN, VOCABULARY, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(VOCABULARY, (tokens,))
    labels[torch.rand(tokens) < masked] = IGNORE_LABEL

    def run(form: Callable) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = form(head, hidden, labels) / (labels[1:] != IGNORE_LABEL).sum()
        return loss.detach(), torch.autograd.grad(loss, (hidden, head.weight))

    return run


def ours(head: LossHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return head(hidden, labels).total


def usual(head: LossHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight).float()
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_LABEL, reduction="sum")


FORMS = {"ours": ours, "usual": usual}


def peak_mib(side: str, tokens: int) -> float:
    code = f"from tools.bench import loss; print(loss.measure_peak({side!r}, {tokens}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_peak(side: str, tokens: int) -> float:
    run = make(tokens, 0.0)
    small = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    (small @ small.t()).float().log_softmax(1).sum().backward()  # what the libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew (Linux, proc(5))
    before = high_water_mib()
    run(FORMS[side])
    return high_water_mib() - before


def high_water_mib() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
