"""What a stage minimizes: the one thing in which preference tuning differs from the other stages.

An objective turns a micro-batch into a summed loss, and says what it is the
sum over; the loop divides by the count of that in the *global* batch.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from megablip.config import Config, PreferenceConfig
from megablip.data.reference import StoredReference
from megablip.engine.symmetry import StepReport
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import PackedLoss
from megablip.model.lora import without_adapters
from megablip.model.preference import PREFERENCE_SUMS, Answers, divergence_sum, preference_loss
from megablip.records import MicroBatch, VisualLayout


class Objective(Protocol):
    sums: tuple[str, ...]
    """Names of what is summed over a step beside the loss of tokens, for curves; `pairs` counts, the rest are means."""

    def count(self, total: StepReport) -> int:
        """What the loss is the mean of: so many in the global batch."""

    def __call__(
        self, engine: ZeroEngine, micro_batch: MicroBatch, features: torch.Tensor | None
    ) -> tuple[PackedLoss, torch.Tensor | None]:
        """The losses of a micro-batch, `loss` with its gradient, and float64 values for `sums`."""


class TokenObjective:
    """Cross entropy of the tokens that have a label."""

    sums: tuple[str, ...] = ()

    def count(self, total: StepReport) -> int:
        return total.valid_labels

    def __call__(self, engine, micro_batch, features):
        return engine(packed=micro_batch, vision_features=features), None


class PreferenceObjective:
    """DPO and its kin; the reference is the model with its adapters off, or what it said of the pairs before.

    Two forwards and one backward for each micro-batch, in the same order on every
    rank; with stored scores one forward.

    Args:
        stored: what the reference says of each pair; None: it is asked.
    """

    def __init__(self, config: PreferenceConfig, stored: StoredReference | None = None):
        self._config, self._stored = config, stored
        # kl: of the next token from the reference, the mean over an answer pair's labels; needs the reference itself
        self.sums = PREFERENCE_SUMS if stored else (*PREFERENCE_SUMS, "kl")

    def count(self, total: StepReport) -> int:
        return total.pairs

    def __call__(self, engine, micro_batch, features):
        forward = partial(engine, packed=micro_batch, vision_features=features, by_document=True)
        pair = micro_batch.pair
        if self._stored:
            losses = forward()
            known = torch.from_numpy(-self._stored.log_probs(micro_batch)).to(losses.document_loss)
            reference = Answers.of(known, losses.document_labels, pair)
        else:
            with torch.no_grad(), without_adapters(engine.module):
                base = forward()
            losses = forward(reference_hidden=base.hidden)
            reference = Answers.of(base.document_loss, base.document_labels, pair)
        policy = Answers.of(losses.document_loss, losses.document_labels, pair)
        found = preference_loss(policy, reference, self._config)
        sums = found.detached()
        if not self._stored:
            kl = divergence_sum(losses.document_divergence, losses.document_labels, pair)
            sums = torch.cat([sums, kl.double().reshape(1)])
        losses.loss, losses.document_loss = found.loss, losses.document_loss.detach()
        return losses, sums


def objective_of(config: Config, base: dict[str, str], layout: VisualLayout) -> Objective:
    """Args:
        base: what the run begins with, as checkpoint.export.base_of has it.

    Raises:
        ShardError: stored scores of the reference that are missing, or not of this run.
    """
    if config.stage != "dpo":
        return TokenObjective()
    stored = StoredReference(config, base, layout) if config.preference.stored_reference else None
    return PreferenceObjective(config.preference, stored)
