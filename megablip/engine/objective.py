"""What a stage minimizes: the one thing in which preference tuning differs from the other stages.

An objective turns a micro-batch into a summed loss, and says what it is the
sum over; the loop divides by the count of that in the *global* batch.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megablip.config import Config, PreferenceConfig
from megablip.engine.symmetry import StepReport
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import PackedLoss
from megablip.model.lora import without_adapters
from megablip.model.preference import PREFERENCE_SUMS, Answers, divergence_sum, preference_loss
from megablip.records import MicroBatch


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
    """DPO and its kin; the reference is the model with its adapters off.

    Two forwards and one backward for each micro-batch, in the same order on every rank.
    """

    sums = (*PREFERENCE_SUMS, "kl")  # kl: of the next token from the reference, the mean over an answer pair's labels

    def __init__(self, config: PreferenceConfig):
        self._config = config

    def count(self, total: StepReport) -> int:
        return total.pairs

    def __call__(self, engine, micro_batch, features):
        with torch.no_grad(), without_adapters(engine.module):
            base = engine(packed=micro_batch, vision_features=features, by_document=True)
        losses = engine(packed=micro_batch, vision_features=features, by_document=True, reference_hidden=base.hidden)
        policy, reference = (
            Answers.of(side.document_loss, side.document_labels, micro_batch.pair) for side in (losses, base)
        )
        found = preference_loss(policy, reference, self._config)
        kl = divergence_sum(losses.document_divergence, losses.document_labels, micro_batch.pair)
        losses.loss, losses.document_loss = found.loss, losses.document_loss.detach()
        return losses, torch.cat([found.detached(), kl.double().reshape(1)])


def objective_of(config: Config) -> Objective:
    return PreferenceObjective(config.preference) if config.stage == "dpo" else TokenObjective()
