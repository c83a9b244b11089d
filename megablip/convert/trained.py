"""Whole models out of committed checkpoints: trained weights from the ranks, frozen ones from where the run began."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megablip.checkpoint.commit import config_of, manifest_of, newest_committed, problems
from megablip.checkpoint.export import VISION_TOWER, ExportReader
from megablip.checkpoint.slices import SliceReader
from megablip.checkpoint.tensors import TensorSource
from megablip.config import ModelConfig
from megablip.convert.folders import read_json
from megablip.convert.lora import Adapter, Merged
from megablip.convert.sources import Joined
from megablip.errors import CheckpointError
from megablip.model.samplers import complete_settings

_HASHING_THREADS = 2
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class TrainedModel:
    """A committed checkpoint as a whole model, adapters merged.

    Attributes:
        start: the export that the run began with.
        weights: all tensors of the export, under its names; fp32 where they were trained.
        trained: names of those that training changed.
        base: what trainer_state.json holds of the export when the run began.
    """

    folder: Path
    start: ExportReader
    model: ModelConfig
    weights: TensorSource
    trained: set[str]
    base: dict[str, str]

    @property
    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that the stage has set."""
        return {} if self.model.grids is None else {"grids": self.model.grids}

    def checks(self) -> list[Callable[[], None]]:
        """Together they hash all that the weights come from; each can run on a thread of its own.

        They raise CheckpointError where one is not what it was when the checkpoint was made.
        """
        return [*(partial(self._check_files, part) for part in range(_HASHING_THREADS)), self._check_start]

    def _check_files(self, part: int) -> None:
        problem = next(problems(self.folder, part, _HASHING_THREADS, weights_only=True), None)
        if problem:
            raise CheckpointError(
                f"the checkpoint can't be used: {problem}",
                where=str(self.folder),
                remedy="name another checkpoint of the run, or restore this one from a copy",
            )

    def _check_start(self) -> None:
        if self.start.hash() != self.base.get("model"):
            raise CheckpointError(
                "the frozen weights are no longer those the run began with",
                where=str(self.start.where),
                remedy="restore the folder; its hash stands in trainer_state.json",
            )
        now = complete_settings(read_json(self.start.folder / "config.json").get("sampler", {}))
        began = json.loads(self.base["sampler"])
        if now != began:
            raise CheckpointError(
                f"the model's sampler is {now}, and this run trained {began}",
                where=str(self.start.where),
                remedy="restore the folder's config.json",
            )


def open_trained(source: Path) -> TrainedModel:
    """The model of a checkpoint; nothing is hashed yet.

    Args:
        source: a run directory (its newest checkpoint) or one checkpoint's folder.

    Raises:
        CheckpointError: nothing committed, or weights that don't fit the model the run began with.
    """
    source = source.resolve()
    folder = source if (source / "COMMITTED").exists() else newest_committed(source)
    model = config_of(folder).model
    start, trained = ExportReader(model.path), SliceReader(folder)
    shapes, found = start.shapes, set(trained.shapes)
    if model.lora:
        adapters = {name.removesuffix(_A) for name in found if name.endswith(_A)}
        expected = {f"{module}{matrix}" for module in adapters for matrix in (_A, _B)}
        expected |= {name for name in found & set(shapes) if not name.startswith(f"{VISION_TOWER}.")}
    else:
        adapters = set()
        frozen = f"{VISION_TOWER}.head." if model.train_tower else f"{VISION_TOWER}."
        expected = {name for name in shapes if not name.startswith(frozen)}
    if expected != found:
        difference = sorted(expected ^ found)
        raise CheckpointError(
            f"the checkpoint and the model differ in {len(difference)} weights, for example {difference[0]}",
            where=f"{folder}, {start.where}",
        )
    for name in found & set(shapes):
        if trained.shapes[name] != shapes[name]:
            raise CheckpointError(
                f"{name} is {trained.shapes[name]} in the checkpoint and {shapes[name]} in the model",
                where=f"{folder}, {start.where}",
            )
    weights: TensorSource = Joined(folder, {name: (trained if name in found else start, name) for name in shapes})
    if adapters:
        scale = model.lora.alpha / model.lora.rank
        weights = Merged(
            weights,
            {f"{module}.weight": Adapter(trained, f"{module}{_A}", f"{module}{_B}", scale) for module in adapters},
        )
    changed = (found & set(shapes)) | {f"{module}.weight" for module in adapters}
    _, state = manifest_of(folder)
    return TrainedModel(folder, start, model, weights, changed, state.get("base", {}))


@contextmanager
def beside(checks: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Run checks, each on a thread, while the body runs: hashing needs a processor, the body the disk.

    Raises:
        Exception: what a check raised first, when the body has ended without an error of its own.
    """
    errors: list[Exception] = []

    def run(check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            errors.append(error)

    # Daemons: a body that failed need not wait for them.
    threads = [threading.Thread(target=run, args=(check,), name="check", daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
