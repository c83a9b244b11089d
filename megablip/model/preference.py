"""Losses on pairs of answers, a preferred one and another (DPO, arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megablip.config import PreferenceConfig
from megablip.model.packing import on_device


@dataclass(frozen=True)
class Answers:
    """Of P pairs: what a model says of the chosen and the rejected answer, each float32[P].

    Attributes:
        chosen, rejected: log-probabilities, summed over the answer's labels.
        chosen_labels, rejected_labels: how many labels.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_labels: Tensor
    rejected_labels: Tensor

    @classmethod
    def of(cls, document_loss: Tensor, document_labels: Tensor, pair: Tensor) -> Answers:
        """Args:
        document_loss: [D], summed cross entropy of each document.
        document_labels: [D].
        pair: int[D] on the host, the number of a document's pair, -1 if none; the chosen answer of a pair comes first.
        """
        chosen, rejected = _members(pair, document_loss.device)
        return cls(
            -document_loss.index_select(0, chosen),
            -document_loss.index_select(0, rejected),
            document_labels.index_select(0, chosen),
            document_labels.index_select(0, rejected),
        )

    def per_label(self) -> Answers:
        """Log-probabilities as means over labels."""
        return Answers(
            self.chosen / self.chosen_labels,
            self.rejected / self.rejected_labels,
            self.chosen_labels,
            self.rejected_labels,
        )


def _members(pair: Tensor, device: torch.device) -> Iterator[Tensor]:
    """int64[P] each: the documents of the chosen and of the rejected answers, pair by pair."""
    members = np.argsort(pair.numpy(), kind="stable")[int((pair < 0).sum()) :]
    return (on_device(side, device) for side in np.ascontiguousarray(members.reshape(-1, 2).T))


def divergence_sum(document_divergence: Tensor, document_labels: Tensor, pair: Tensor) -> Tensor:
    """Of each pair the mean divergence over the labels of both answers; summed over pairs."""
    chosen, rejected = _members(pair, document_divergence.device)
    divergence, labels = (x[chosen] + x[rejected] for x in (document_divergence, document_labels))
    return (divergence / labels).sum()


@dataclass(frozen=True)
class PreferenceLoss:
    """Sums over P pairs; `loss` carries the gradient, the rest are for curves."""

    loss: Tensor
    accuracy: Tensor  # pairs whose chosen answer gained more on the reference than the rejected one
    margin: Tensor  # of the rewards, beta x (policy - reference)
    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    chosen_log_ratio: Tensor  # policy - reference per label: below 0 the answers that are preferred become rarer
    pairs: Tensor

    def detached(self) -> Tensor:
        """float64, in the order of PREFERENCE_SUMS."""
        return torch.stack([getattr(self, name).detach().double() for name in PREFERENCE_SUMS])


PREFERENCE_SUMS = tuple(field.name for field in fields(PreferenceLoss))


def preference_loss(policy: Answers, reference: Answers, config: PreferenceConfig) -> PreferenceLoss:
    """The loss of each pair, summed; no pairs give 0 with a gradient of exact zeros.

    With h = (policy - reference) of the chosen answer less that of the rejected:

        sigmoid    -(1 - e) log s(beta h) - e log s(-beta h), e the label smoothing: above 0 it is
                   conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023)
        ipo        (h - 1 / (2 beta))^2 with log-probabilities per label (arXiv 2310.12036, equation 17)

    plus sft_weight times the chosen answer's mean cross entropy per label (arXiv 2404.19733, equation 1).
    """
    per_label = policy.per_label()
    chosen_log_ratio = per_label.chosen - reference.per_label().chosen
    if config.length_normalized or config.loss == "ipo":
        policy, reference = per_label, reference.per_label()
    chosen_gain, rejected_gain = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    h = chosen_gain - rejected_gain
    if config.loss == "ipo":
        losses = (h - 1 / (2 * config.beta)).square()
    else:
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(config.beta * h) - smoothing * F.logsigmoid(-config.beta * h)
    if config.sft_weight:
        losses = losses - config.sft_weight * per_label.chosen
    return PreferenceLoss(
        loss=losses.sum(),
        accuracy=(h > 0).sum(),
        margin=config.beta * h.sum(),
        chosen_reward=config.beta * chosen_gain.sum(),
        rejected_reward=config.beta * rejected_gain.sum(),
        chosen_log_prob=policy.chosen.sum(),
        rejected_log_prob=policy.rejected.sum(),
        chosen_log_ratio=chosen_log_ratio.sum(),
        pairs=h.new_full((), len(h)),
    )
