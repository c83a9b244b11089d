"""The loss on held-out data, source by source, always over the same sequences."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from megablip.config import Config, held_out_run
from megablip.data.loader import Loader, StepBatch
from megablip.engine.rng import restore_rng, rng_states
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.errors import MegablipError
from megablip.model.blip3 import Blip3Config
from megablip.model.vision import encode_tiles


class HeldOut:
    """Measures the loss on held-out data; training goes on as if it had not.

    The sequences are the first global batches of a run over the held-out
    sources: read once, at the first measurement, and kept.  All ranks make the
    same number of forward calls, with dummies where they have no data.

    Args:
        tower: the frozen one outside the model; None: it is trained inside.
    """

    def __init__(
        self,
        config: Config,
        model_config: Blip3Config,
        topology: Topology,
        engine: ZeroEngine,
        tower: nn.Module | None,
    ):
        self._settings, self._run = config.held_out, held_out_run(config)
        self._model_path, self._layout = config.model.path, model_config.layout
        self._topology, self._engine, self._tower = topology, engine, tower
        self._names = [source.name for source in config.held_out.sources]
        self._batches: list[StepBatch] | None = None

    def is_due(self, step: int, finished: bool) -> bool:
        """After a step; `finished`: it was the last of the training."""
        return self._run is not None and (finished or step % self._settings.every_steps == 0)

    def measure(self) -> dict[str, float]:
        """The mean loss per label, and that of each source that has labels (a collective).

        Raises:
            MegablipError: on all ranks, where one can't read the data.
        """
        if self._batches is None:
            self._batches = self._read()
        random_states = rng_states()
        device = self._topology.device
        # Rows: loss, labels; the last column is that of dummies, whose source is -1.
        sums = torch.zeros(2, len(self._names) + 1, dtype=torch.float64, device=device)
        for micro_batch in (micro_batch for batch in self._batches for micro_batch in batch.micro_batches):
            micro_batch = micro_batch.to(device)
            features = encode_tiles(self._tower, micro_batch.tiles) if self._tower else None
            losses = self._engine.evaluate(packed=micro_batch, vision_features=features)
            column = micro_batch.source % sums.shape[1]
            sums[0].index_add_(0, column, losses.document_loss.double())
            sums[1].index_add_(0, column, losses.document_labels.double())
        dist.all_reduce(sums)
        restore_rng(random_states)
        loss, labels = sums.tolist()
        return {"held_out_loss": sum(loss) / max(sum(labels), 1)} | {
            f"held_out_loss_by_source/{name}": loss[number] / labels[number]
            for number, name in enumerate(self._names)
            if labels[number]
        }

    def _read(self) -> list[StepBatch]:
        batches, failure = [], ""
        try:
            batches = list(self._first_batches())
        except MegablipError as error:
            failure = f"{type(error).__name__}: {error}"
        failures = {rank: text for rank, text in enumerate(self._topology.gather(failure)) if text}
        if failures:
            rank, text = next(iter(failures.items()))
            raise MegablipError(
                f"the held-out data can't be read: {text}",
                where=f"rank {rank}",
                remedy="mend the shards, or take the source out of held_out.sources",
            )
        return batches

    def _first_batches(self) -> Iterator[StepBatch]:
        with Loader(
            self._run, self._model_path, self._layout, self._topology.rank, self._topology.world, None,
            pin_memory=self._topology.device.type == "cuda",
        ) as loader:  # fmt: skip
            yield from islice(loader, self._settings.batches)
