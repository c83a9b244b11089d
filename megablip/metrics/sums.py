"""What all ranks' shares of a step add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from megablip.model.blip3 import PackedLoss
from megablip.records import MicroBatch, VisualLayout


@dataclass
class RankFacts:
    """What one rank computes in a step, and what it holds of the machine."""

    tiles: float = 0  # of images, dummy tiles left out
    visual_tokens: float = 0
    attended_pairs: float = 0  # (query, key) pairs of the decoder's causal attention, of one head in one layer
    micro_batches: float = 0
    dummies: float = 0  # of those, the ones without an image
    dropped: float = 0  # samples that no sequence can hold, of this rank's lanes since the start of the run
    host_bytes: float = 0  # resident memory of the rank's process
    device_bytes: float = 0  # highest so far of tensors on the device


_BY_SOURCE = ("loss", "labels", "drawn", "bad", "tokens", "images")


class StepSums:
    """Sums of one step over micro-batches and ranks, for each source; and each rank's facts.

    Args:
        names: of the sources.
        drawn: int64[sources], samples that this rank's lanes have drawn since the start of the run.
        bad: samples of each source, by name, that this rank counts as bad.
        micro_batches: of this rank, on the host.
        facts: of this rank; those of the micro-batches are added here.
        layout: of the images.
        window: tokens that one of the decoder sees at most, itself included; None: no limit.
        objective: names of what the stage's objective sums, `pairs` among them if there is any.
        rank, world: data-parallel.
        device: that the losses are on.
    """

    def __init__(
        self,
        names: Sequence[str],
        drawn: np.ndarray,
        bad: Mapping[str, int],
        micro_batches: Sequence[MicroBatch],
        facts: RankFacts,
        layout: VisualLayout,
        window: int | None,
        objective: Sequence[str],
        rank: int,
        world: int,
        device: torch.device,
    ):
        self._names, self._world, self._objective_names = names, world, tuple(objective)
        # The last column is that of dummies, whose source is -1.
        by_source = np.zeros((len(_BY_SOURCE), len(names) + 1))
        by_source[2, :-1] = drawn
        by_source[3, :-1] = [bad.get(name, 0) for name in names]
        for micro_batch in micro_batches:
            source = micro_batch.source.numpy()
            lengths = np.array(micro_batch.doc_lens)
            np.add.at(by_source[4], source, lengths)
            np.add.at(by_source[5], source[documents_of_images(micro_batch, layout)], 1)
            facts.micro_batches += 1
            facts.dummies += micro_batch.dummy
            facts.tiles += 0 if micro_batch.dummy else len(micro_batch.tiles)
            facts.visual_tokens += len(micro_batch.visual_token_index)
            facts.attended_pairs += attended_pairs(lengths[source >= 0], window)
        by_source[4:, -1] = 0
        by_rank = np.zeros((world, len(fields(RankFacts))))
        by_rank[rank] = astuple(facts)
        flat = np.concatenate([by_source.ravel(), by_rank.ravel(), np.zeros(len(objective))])
        self._sums = torch.from_numpy(flat).to(device)
        self._objective = self._sums[len(flat) - len(objective) :]
        self._losses = self._sums[: 2 * (len(names) + 1)].view(2, -1)

    def add(self, micro_batch: MicroBatch, losses: PackedLoss, objective: torch.Tensor | None = None) -> None:
        """Args:
        micro_batch: on the device.
        objective: float64 values of what the objective sums.
        """
        if objective is not None:
            self._objective += objective
        column = micro_batch.source % self._losses.shape[1]
        self._losses[0].index_add_(0, column, losses.document_loss.double())
        self._losses[1].index_add_(0, column, losses.document_labels.double())

    def reduce(self) -> None:
        """Add up what the ranks have (a collective, and a wait for the device)."""
        dist.all_reduce(self._sums)
        flat = self._sums.cpu().numpy()
        middle = len(_BY_SOURCE) * (len(self._names) + 1)
        self._by_source = dict(zip(_BY_SOURCE, flat[:middle].reshape(len(_BY_SOURCE), -1), strict=True))
        end = len(flat) - len(self._objective_names)
        by_rank = flat[middle:end].reshape(self._world, -1)
        self._of_objective = dict(zip(self._objective_names, flat[end:].tolist(), strict=True))
        self.total = RankFacts(*by_rank.sum(axis=0).tolist())
        """Over all ranks."""
        self.largest = RankFacts(*by_rank.max(axis=0).tolist())
        """Of any rank."""

    @property
    def loss(self) -> float:
        """Of the objective: the mean over the labels of the global batch, or over its pairs."""
        return self.by_pair["loss"] if self._objective_names else self.token_loss

    @property
    def by_pair(self) -> dict[str, float]:
        """Means of what the objective sums; empty for one of tokens."""
        pairs = max(self._of_objective.get("pairs", 0), 1)
        return {name: value / pairs for name, value in self._of_objective.items() if name != "pairs"}

    @property
    def token_loss(self) -> float:
        """Cross entropy, the mean over the labels of the global batch."""
        return float(self._by_source["loss"].sum() / max(self._by_source["labels"].sum(), 1))

    @property
    def loss_by_source(self) -> dict[str, float]:
        """Of the sources that have labels in this step."""
        loss, labels = self._by_source["loss"], self._by_source["labels"]
        return {name: float(loss[n] / labels[n]) for n, name in enumerate(self._names) if labels[n]}

    def count(self, kind: str) -> dict[str, int]:
        """By name of the source. Args: kind: labels, drawn, bad, tokens or images."""
        return dict(zip(self._names, self._by_source[kind].astype(int).tolist(), strict=False))


def attended_pairs(lengths: np.ndarray, window: int | None = None) -> int:
    """(query, key) pairs that causal attention within documents of these lengths looks at."""
    lengths = lengths.astype(np.int64)
    if window is None:
        return int((lengths * (lengths + 1) // 2).sum())
    full = np.minimum(lengths, window)
    return int((full * (full + 1) // 2 + (lengths - full) * window).sum())


def documents_of_images(micro_batch: MicroBatch, layout: VisualLayout) -> np.ndarray:
    """int64[I]: the number of each image's document."""
    first, _ = layout.spans(micro_batch.grid.numpy())
    first_tokens = micro_batch.visual_token_index.numpy()[first]
    return np.searchsorted(micro_batch.cu_seqlens.numpy(), first_tokens, side="right") - 1
