"""The mean of a run's last checkpoints (arXiv 2203.05482, 2306.03241): often better than the last one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megablip.checkpoint.commit import committed
from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.convert.folders import copy_companions, say_written
from megablip.convert.sources import copy
from megablip.convert.trained import beside, open_trained
from megablip.errors import CheckpointError, ConfigError


class Mean:
    """The mean of several models' trained tensors, added up in fp32; all others are the first one's.

    Args:
        sources: of one model, with the same names and shapes.
    """

    def __init__(self, sources: Sequence[TensorSource], trained: set[str]):
        self._sources, self._trained = sources, trained
        self.where, self.shapes = sources[0].where, sources[0].shapes
        self.dtypes = sources[0].dtypes | dict.fromkeys(trained, torch.float32)

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        first = self._sources[0].elements(name, start, end)
        if name not in self._trained:
            return first
        total = first.to(torch.float32, copy=True)
        for source in self._sources[1:]:
            total += source.elements(name, start, end)
        return total.div_(len(self._sources))


def average(run_dir: Path, output: Path, last: int, dtype: str = "fp32", remote_code: bool = False) -> None:
    """Write the mean of the last committed checkpoints of a run as a Hugging Face folder.

    Raises:
        CheckpointError: the run has fewer, or one is damaged.
        ConfigError: `last` is below 2, unknown dtype, or `output` exists.
    """
    torch_dtype = precision(dtype)
    if last < 2:
        raise ConfigError(f"the mean of {last} checkpoints", where="--last", remedy="give 2 or more")
    folders = committed(run_dir / "checkpoints")[-last:]
    if len(folders) < last:
        raise CheckpointError(
            f"the run has {len(folders)} committed checkpoints, not {last}",
            where=str(run_dir),
            remedy="give fewer, or keep more of them in training (checkpoint.keep)",
        )
    models = [open_trained(folder) for folder in folders]
    newest = models[-1]
    if any(model.trained != newest.trained for model in models):
        raise CheckpointError("the checkpoints differ in what was trained", where=str(run_dir))
    mean = Mean([model.weights for model in models], newest.trained)
    with new_folder(output) as staging, beside([check for model in models for check in model.checks()]):
        copy_companions(newest.start.where, staging, torch_dtype, newest.config_changes, remote_code=remote_code)
        with ShardWriter(staging, mean.shapes, torch_dtype, title="averaging") as writer:
            copy(mean, writer)
    say_written(output, ", ".join(folder.name for folder in folders))
