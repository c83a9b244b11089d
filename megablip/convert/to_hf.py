"""A committed checkpoint as a folder that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.convert.folders import copy_companions, say_written
from megablip.convert.sources import copy
from megablip.convert.trained import beside, open_trained


def zero_to_hf(source: Path, output: Path, dtype: str = "fp32", remote_code: bool = False) -> None:
    """Write a committed checkpoint, of any number of ranks and ZeRO stage, as Hugging Face files.

    The trained weights come from the ranks' files, the frozen ones (the tower's,
    or of a trained tower its pooling head), config, tokenizer and processor from the
    export that the run began with; adapters are merged. The hashes of all that is
    read are checked meanwhile.

    Args:
        source: a run directory (its newest checkpoint) or one checkpoint's folder.
        dtype: fp32, bf16 or fp16; the masters are fp32.
        remote_code: put the model's code into the folder, so that it loads
            without megablip (`trust_remote_code=True`).

    Raises:
        CheckpointError: nothing committed, a damaged file, or weights that
            don't fit the model.
        ConfigError: unknown dtype, or `output` exists.
    """
    torch_dtype = precision(dtype)
    trained = open_trained(source)
    with new_folder(output) as staging, beside(trained.checks()):
        copy_companions(trained.start.where, staging, torch_dtype, trained.config_changes, remote_code=remote_code)
        with ShardWriter(staging, trained.weights.shapes, torch_dtype) as writer:
            copy(trained.weights, writer)
    say_written(output, trained.folder.name)
