"""Released xGen-MM weights to a Hugging Face folder of ours, and back.

Names, shapes and places are those of checkpoint/xgenmm.py. Nothing is lost but
what has no place on the other side, and that is listed row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.torch_writer import TorchFileWriter
from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.checkpoint.xgenmm import (
    PREFIX,
    ReleasedTensor,
    bare_name,
    model_shapes,
    our_sources,
    our_unfilled,
    released_config,
    released_layout,
)
from megablip.convert.folders import read_json, say_written, write_remote_code_into
from megablip.convert.sources import Joined, Span, Spliced, copy, tensors_in, under_prefix
from megablip.convert.tokenizers import extended_tokenizer, save_processor
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3Config

_TOWER = "vision_encoder."


def xgenmm_to_hf(
    source: Path,
    output: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    tower: Path | None = None,
    dtype: str = "fp32",
    remote_code: bool = False,
) -> list[str]:
    """Write released weights as a folder that `from_pretrained` loads.

    Args:
        source: a folder of safetensors, one such file, or a checkpoint of LAVIS (.pt).
        config: config.json of a megablip model, for other sizes than those of the release v1.5.
        tokenizer: folder of the decoder's tokenizer, by default `source`; the added tokens are appended.
        tower: folder of a SigLIP model, whose weights `source` lacks if it was saved in training.

    Returns:
        What has no place in ours, in words.

    Raises:
        CheckpointError: names or shapes that are not those of the layout; the tower's are missing.
        ConfigError: unknown dtype, `output` exists, or a tokenizer with other ids.
    """
    torch_dtype = precision(dtype)
    stored = bare(tensors_in(source))
    blip3_config = _our_config(config)
    shapes = model_shapes(blip3_config)
    first = blip3_config.image_token_id
    rows = stored.shapes.get("lang_model.lm_head.weight", (0,))[0]
    layout = released_layout(shapes, first_added=first, table_rows=rows)
    stored = _with_tower(stored, layout, tower, source)
    _check(stored, layout, source)
    ours = Spliced(source, shapes, dtypes_of_ours(shapes, layout, stored), spans_of_ours(shapes, layout, stored))
    tokenizer = tokenizer or (source if (source / "tokenizer.json").exists() else None)
    with new_folder(output) as staging:
        blip3_config.dtype = torch_dtype
        blip3_config.architectures = ["Blip3ForConditionalGeneration"]
        blip3_config.save_pretrained(staging)
        if tokenizer:
            tokens = extended_tokenizer(tokenizer, staging)
            if tokens.image_id != first:
                raise ConfigError(
                    f"the tokenizer gives <image> the id {tokens.image_id}, the weights give it {first}",
                    where=str(tokenizer),
                    remedy="give the tokenizer of the decoder that the weights began with",
                )
            save_processor(staging, blip3_config.layout)
        if remote_code:
            write_remote_code_into(staging)
        with ShardWriter(staging, shapes, torch_dtype) as writer:
            copy(ours, writer)
    lost = [_in_words(tensor.name, tensor.unplaced) for tensor in layout if tensor.unplaced]
    say_written(output, source)
    if not tokenizer:
        print("no tokenizer was given (--tokenizer), so the folder has no processor")
    return lost


def hf_to_xgenmm(source: Path, output: Path, *, dtype: str = "fp32", lavis: bool = False) -> list[str]:
    """Write a model of ours under the released names, for code that loads xGen-MM.

    Args:
        lavis: write what LAVIS loads: a .pt file, names without `vlm.`.

    Returns:
        What the released layout has no place for, or ours no value for, in words.

    Raises:
        CheckpointError: a tensor that no part of the released layout has.
        ConfigError: the model's parts are not those of xGen-MM.
    """
    torch_dtype = precision(dtype)
    ours = ExportReader(source)
    config = Blip3Config.from_pretrained(source)
    kinds = (config.text_config.model_type, config.vision_config.model_type)
    if kinds != ("phi3", "siglip_vision_model"):
        raise ConfigError(
            f"xGen-MM has the decoder phi3 and the tower siglip_vision_model, not {' and '.join(kinds)}",
            where=str(source),
            remedy="only models with its parts have released names",
        )
    if config.text_config.tie_word_embeddings:
        raise ConfigError(
            "the output head is tied to the embeddings, and xGen-MM's is not",
            where=str(source),
            remedy="only models with its parts have released names",
        )
    shapes = ours.shapes
    layout = released_layout(shapes, first_added=config.image_token_id)
    prefix = "" if lavis else PREFIX
    released = Spliced(
        source,
        {prefix + tensor.name: tensor.shape for tensor in layout},
        {prefix + tensor.name: torch_dtype for tensor in layout},
        {
            prefix + tensor.name: [
                _span(tensor.shape, rows.start, rows.end, ours, rows.ours, rows.ours_start) for rows in tensor.rows
            ]
            for tensor in layout
        },
    )
    kind = TorchFileWriter if lavis else ShardWriter
    with new_folder(output) as staging, kind(staging, released.shapes, torch_dtype) as writer:
        copy(released, writer)
    notes = [f"{_in_words(tensor.name, tensor.unplaced)}: zeros" for tensor in layout if tensor.unplaced]
    notes += [f"{_in_words(name, gaps)}: no place" for name, gaps in our_unfilled(layout, shapes).items()]
    if config.tile_layout != "released":
        notes.append("tile_layout is crops: xGen-MM's own code regroups the tiles of grids with several columns")
    say_written(output, source)
    return notes


def bare(source: TensorSource) -> TensorSource:
    """Released tensors under their bare names.

    Raises:
        CheckpointError: two tensors have one name then.
    """
    names: dict[str, str] = {}
    for name in source.shapes:
        if (other := names.setdefault(bare_name(name), name)) != name:
            raise CheckpointError(f"{name} and {other} are one tensor's names", where=str(source.where))
    return Joined(source.where, {short: (source, name) for short, name in names.items()})


def dtypes_of_ours(
    shapes: Mapping[str, tuple[int, ...]], layout: Iterable[ReleasedTensor], stored: TensorSource
) -> dict[str, torch.dtype]:
    """What each of our tensors is stored in."""
    return {name: stored.dtypes[parts[0][0].name] for name, parts in our_sources(layout).items() if name in shapes}


def _our_config(path: Path | None) -> Blip3Config:
    if path is None:
        return released_config()
    path = path / "config.json" if path.is_dir() else path
    return Blip3Config.from_dict(read_json(path))


def _with_tower(stored: TensorSource, layout: list[ReleasedTensor], tower: Path | None, where: Path) -> TensorSource:
    wanted = [tensor.name.removeprefix(_TOWER) for tensor in layout if tensor.name.startswith(_TOWER)]
    if any(name.startswith(_TOWER) for name in stored.shapes):
        return stored
    if tower is None:
        raise CheckpointError(
            "the file has no weights of the vision tower, which training leaves out where it is frozen",
            where=str(where),
            remedy="give a folder of the SigLIP model by --tower",
        )
    parts = {name: (stored, name) for name in stored.shapes}
    return Joined(stored.where, parts | under_prefix(ExportReader(tower), wanted, _TOWER))


def _check(stored: TensorSource, layout: list[ReleasedTensor], where: Path) -> None:
    expected = {tensor.name: tensor.shape for tensor in layout}
    difference = sorted(expected.keys() ^ stored.shapes.keys())
    if difference:
        name = difference[0]
        raise CheckpointError(
            f"{len(difference)} names are not those of the layout, for example {name}, "
            + ("which is missing" if name in expected else "which is unknown"),
            where=str(where),
            remedy="for other sizes than those of the release give a config.json by --config",
        )
    for name, shape in expected.items():
        if stored.shapes[name] != shape:
            raise CheckpointError(
                f"{name} is {stored.shapes[name]}, not {shape}",
                where=str(where),
                remedy="for other sizes than those of the release give a config.json by --config",
            )


def spans_of_ours(
    shapes: Mapping[str, tuple[int, ...]], layout: list[ReleasedTensor], stored: TensorSource
) -> dict[str, list[Span]]:
    """Where the elements of each of our tensors lie among the released ones."""
    return {
        name: [
            _span(shapes[name], rows.ours_start, rows.ours_end, stored, tensor.name, rows.start)
            for tensor, rows in parts
        ]
        for name, parts in our_sources(layout).items()
    }


def _span(shape: tuple[int, ...], start: int, end: int, source: TensorSource, name: str, source_start: int) -> Span:
    """Rows [start, end) of a tensor of this shape, which begin at row `source_start` of another."""
    row = math.prod(shape[1:])
    return Span(start * row, end * row, source, name, source_start * row)


def _in_words(name: str, rows: list[tuple[int, int]]) -> str:
    ranges = ", ".join(f"{start} to {end - 1}" for start, end in rows)
    return f"{name}, rows {ranges}"
