"""DeepSpeed's own files as safetensors, with config and tokenizer where a model's folder is given."""

from __future__ import annotations

from pathlib import Path

from megablip.checkpoint.deepspeed_files import read_zero
from megablip.checkpoint.deepspeed_weights import DeepSpeedWeights
from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.convert.folders import copy_companions
from megablip.convert.sources import stretches
from megablip.errors import CheckpointError


def zero_files_to_hf(
    source: Path,
    output: Path,
    dtype: str = "fp32",
    *,
    like: Path | None = None,
    strip_prefix: str = "",
    remote_code: bool = False,
) -> None:
    """Write the weights of DeepSpeed's own files as safetensors.

    Args:
        source: the folder with the *_optim_states.pt files, or that with `latest` beside it.
        dtype: fp32, bf16 or fp16, of floating tensors; others keep theirs.
        like: folder of the model in Hugging Face's format: gives names, config, processor
            and tokenizer, and the parameters that the checkpoint lacks because they were
            not trained. None: all tensors by their names in the checkpoint, no config.
        strip_prefix: what the names begin with in the checkpoint, for example "module.".
        remote_code: put the model's code beside config and weights.

    Raises:
        CheckpointError: no such checkpoint, damaged or mixed files, or the model of `like` is another one.
        ConfigError: unknown dtype, or `output` exists.
    """
    torch_dtype = precision(dtype)
    weights = DeepSpeedWeights(read_zero(source).without_prefix(strip_prefix))
    base = ExportReader(like) if like else None
    shapes = dict(weights.shapes)
    if base:
        shapes = {name: base.shape(name) for name in base.names}
        _check_fit(weights, base)
    dtypes = dict.fromkeys(shapes, torch_dtype)
    dtypes |= {name: own for name, own in weights.dtypes.items() if name in shapes and not own.is_floating_point}
    with new_folder(output) as staging:
        if base:
            copy_companions(base.where, staging, torch_dtype, remote_code=remote_code)
        with ShardWriter(staging, shapes, dtypes) as writer:
            for name in writer.order:
                if name in weights.shapes:
                    for start, values in weights.pieces(name):
                        writer.write(name, start, values)
                else:
                    for start, end in stretches(shapes[name]):
                        writer.write(name, start, base.elements(name, start, end))
    taken = [name for name in shapes if name not in weights.shapes]
    print(f"wrote {output}" + (f"; {len(taken)} weights are those of {like}, as {taken[0]}" if taken else ""))


def _check_fit(weights: DeepSpeedWeights, base: ExportReader) -> None:
    names = set(base.names)
    unknown = sorted(weights.shapes.keys() - names - weights.aliases - weights.buffers)
    if unknown:
        raise CheckpointError(
            f"the model has no weight {unknown[0]}, which the checkpoint has, nor {len(unknown) - 1} others",
            where=f"{weights.where}, {base.folder}",
            remedy="give the folder of the same model; --strip-prefix takes away what all names begin with",
        )
    for name in sorted(names & weights.shapes.keys()):
        if tuple(base.shape(name)) != weights.shapes[name]:
            raise CheckpointError(
                f"{name} is {weights.shapes[name]} in the checkpoint and {tuple(base.shape(name))} in the model",
                where=f"{weights.where}, {base.folder}",
                remedy="give the folder of the same model",
            )
