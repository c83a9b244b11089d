"""A checkpoint of any kind, told by what lies there."""

from __future__ import annotations

from pathlib import Path

from megablip.checkpoint.commit import committed
from megablip.checkpoint.deepspeed_files import is_deepspeed, read_zero
from megablip.checkpoint.deepspeed_weights import DeepSpeedWeights
from megablip.checkpoint.tensors import TensorSource
from megablip.convert.sources import tensors_in
from megablip.convert.trained import open_trained
from megablip.errors import CheckpointError


def is_committed(source: Path) -> bool:
    """Whether it is a run directory with checkpoints, or one of them."""
    return (source / "COMMITTED").exists() or bool(committed(source / "checkpoints"))


def open_weights(source: Path) -> TensorSource:
    """The weights of a run, of a committed checkpoint, of DeepSpeed's files, or of any folder or file of tensors.

    Raises:
        CheckpointError: there is nothing of the kind, or it is damaged.
    """
    if not source.exists():
        raise CheckpointError("there is no such file or folder", where=str(source), remedy="check the path")
    if is_committed(source):
        return open_trained(source).weights
    if is_deepspeed(source):
        return DeepSpeedWeights(read_zero(source))
    return tensors_in(source)
