"""Whether a checkpoint is whole: hashes, shapes, finite values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from megablip.checkpoint.commit import newest_committed, problems
from megablip.checkpoint.slices import SliceReader
from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.xgenmm import model_shapes
from megablip.convert.folders import read_json
from megablip.convert.kinds import is_committed, open_weights
from megablip.convert.sources import stretches
from megablip.errors import CheckpointError, MegablipError
from megablip.model.blip3 import Blip3Config
from megablip.records import MASTER, MOMENTS


def verify(source: Path) -> list[str]:
    """What is wrong with a checkpoint of any kind; nothing if it is whole.

    A committed checkpoint: every file's hash, every element of every parameter in
    some rank's file, weights and moments finite. A folder of our models: the shapes
    that its config gives. All: well-formed files, finite values.
    """
    try:
        if is_committed(source):
            return list(_committed(source if (source / "COMMITTED").exists() else newest_committed(source)))
        weights = open_weights(source)
        return [*_shapes(source, weights), *_not_finite(weights)]
    except CheckpointError as error:
        return [_line(error)]


def _committed(folder: Path) -> Iterator[str]:
    yield from problems(folder)
    reader = SliceReader(folder)
    for name, shape in track(reader.shapes.items(), "verifying", transient=True):
        for kind in (MASTER, *MOMENTS):
            try:
                wrong = sum(
                    int((~reader.read(name, kind, shape, start, end).isfinite()).sum())
                    for start, end in stretches(shape)
                )
            except CheckpointError as error:
                yield _line(error)
                continue
            if wrong:
                yield f"{name}|{kind}: {wrong:,} values are not finite"


def _shapes(source: Path, weights: TensorSource) -> Iterator[str]:
    if not (source / "config.json").exists():
        return
    config = read_json(source / "config.json")
    if config.get("model_type") != Blip3Config.model_type:
        return
    try:
        expected = model_shapes(Blip3Config.from_dict(config))
    except MegablipError as error:
        yield _line(error)
        return
    found = weights.shapes
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is none of the model's"
        elif found[name] != expected[name]:
            yield f"{name} is {found[name]}, by config.json {expected[name]}"


def _not_finite(weights: TensorSource) -> Iterator[str]:
    dtypes = weights.dtypes
    for name, shape in track(weights.shapes.items(), "verifying", transient=True):
        if dtypes[name].is_floating_point:
            wrong = sum(int((~weights.elements(name, start, end).isfinite()).sum()) for start, end in stretches(shape))
            if wrong:
                yield f"{name}: {wrong:,} values are not finite"


def _line(error: MegablipError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
