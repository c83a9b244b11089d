"""Loss and data, source by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megablip.model.blip3 import PackedLoss
from megablip.records import MicroBatch


class SourceSums:
    """Sums of one step over micro-batches and ranks, for each source.

    Args:
        names: of the sources.
        drawn: int64[sources], samples that this rank's lanes have drawn since the start of the run.
        bad: samples of each source, by name, that this rank counts as bad.
        device: that the losses are on.
    """

    def __init__(self, names: Sequence[str], drawn: np.ndarray, bad: Mapping[str, int], device: torch.device):
        self._names = names
        # Rows: loss, labels, samples drawn, bad samples; the last column is that of dummies.
        self._sums = torch.zeros(4, len(names) + 1, dtype=torch.float64, device=device)
        self._sums[2, :-1] = torch.from_numpy(drawn)
        self._sums[3, :-1] = torch.tensor([bad.get(name, 0) for name in names])

    def add(self, micro_batch: MicroBatch, losses: PackedLoss) -> None:
        column = micro_batch.source % (len(self._names) + 1)
        self._sums[0].index_add_(0, column, losses.document_loss.double())
        self._sums[1].index_add_(0, column, losses.document_labels.double())

    def reduce(self) -> None:
        """Add up what the ranks have (a collective)."""
        dist.all_reduce(self._sums)

    @property
    def bad(self) -> dict[str, int]:
        """Bad samples of each source, by name."""
        return {name: int(count) for name, count in zip(self._names, self._sums[3].tolist(), strict=False)}

    def scalars(self, samples: Mapping[str, int]) -> dict[str, float]:
        """The mean loss, that of each source, and the epochs that each has been through.

        Args:
            samples: of each source that is counted, by name.
        """
        loss, labels, drawn, _ = self._sums.tolist()
        scalars = {"loss": sum(loss) / max(sum(labels), 1)}
        for number, name in enumerate(self._names):
            if labels[number]:
                scalars[f"loss_by_source/{name}"] = loss[number] / labels[number]
            if name in samples:
                scalars[f"epochs_by_source/{name}"] = drawn[number] / samples[name]
        return scalars
