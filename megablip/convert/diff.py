"""How two checkpoints differ, of whatever kinds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.xgenmm import bare_name, released_layout
from megablip.convert.kinds import open_weights
from megablip.convert.sources import Joined, Spliced, stretches
from megablip.convert.xgenmm import bare, dtypes_of_ours, spans_of_ours

_RELEASED_FIRST_ADDED = 32012


@dataclass(frozen=True)
class Difference:
    """What two sets of tensors do not have in common.

    Attributes:
        missing, extra: names that only the first, only the second has.
        shapes: names whose shapes differ, with both.
        values: name -> (elements that differ, largest absolute difference, that over the largest value).
    """

    missing: list[str]
    extra: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    values: dict[str, tuple[int, float, float]]

    @property
    def none(self) -> bool:
        return not (self.missing or self.extra or self.shapes or self.values)


def diff(one: Path, other: Path) -> bool:
    """Print how two checkpoints differ; True if all tensors have the same names, shapes and values.

    Values are compared as numbers, so that bf16 equals the fp32 it came from; NaN equals NaN.
    Released names of xGen-MM are taken for ours if the other side has those.

    Raises:
        CheckpointError: one can't be read.
    """
    found = compare(*aligned(open_weights(one), open_weights(other), one, other))
    console = Console()
    for title, names in ((f"only in {one}", found.missing), (f"only in {other}", found.extra)):
        if names:
            console.print(f"{title}: {len(names)}", *names[:20], *(["..."] if names[20:] else []), sep="\n    ")
    for name, (first, second) in found.shapes.items():
        console.print(f"shape of {name}: {first} and {second}")
    if found.values:
        table = Table("tensor", "elements that differ", "largest difference", "relative to the largest value")
        ordered = sorted(found.values.items(), key=lambda item: -item[1][1])
        for name, (count, largest, relative) in ordered[:40]:
            table.add_row(name, f"{count:,}", f"{largest:.3e}", f"{relative:.1e}")
        console.print(table)
        console.print(f"{len(found.values)} tensors have other values")
    if found.none:
        console.print("the same names, shapes and values")
    return found.none


def compare(one: TensorSource, other: TensorSource) -> Difference:
    """Stretch by stretch, so that nothing is held whole."""
    a, b = one.shapes, other.shapes
    shared = sorted(a.keys() & b.keys())
    shapes = {name: (a[name], b[name]) for name in shared if a[name] != b[name]}
    values = {}
    for name in track(shared, "comparing", transient=True):
        if name not in shapes:
            count, largest, scale = 0, 0.0, 0.0
            for start, end in stretches(a[name]):
                here = _compare(one.elements(name, start, end), other.elements(name, start, end))
                count, largest, scale = count + here[0], max(largest, here[1]), max(scale, here[2])
            if count:
                values[name] = (count, largest, largest / scale if scale else largest)
    return Difference(sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()), shapes, values)


def aligned(
    one: TensorSource, other: TensorSource, one_path: Path, other_path: Path
) -> tuple[TensorSource, TensorSource]:
    """Both under our names, if one of them has released ones and the other has not."""
    if _is_released(one) and not _is_released(other):
        return _as_ours(one, other, other_path), other
    if _is_released(other) and not _is_released(one):
        return one, _as_ours(other, one, one_path)
    return one, other


def _is_released(source: TensorSource) -> bool:
    return any(bare_name(name).startswith("lang_model.") for name in source.shapes)


def _as_ours(released: TensorSource, ours: TensorSource, path: Path) -> TensorSource:
    stored, shapes = bare(released), ours.shapes
    try:
        first = int(json.loads((path / "config.json").read_text())["image_token_id"])
    except (OSError, ValueError, KeyError, TypeError):
        first = _RELEASED_FIRST_ADDED
    rows = stored.shapes.get("lang_model.lm_head.weight", (0,))[0]
    layout = [
        tensor
        for tensor in released_layout(shapes, first_added=first, table_rows=rows)
        if stored.shapes.get(tensor.name) == tensor.shape
    ]
    spans, dtypes = spans_of_ours(shapes, layout, stored), dtypes_of_ours(shapes, layout, stored)
    placed = Spliced(released.where, {name: shapes[name] for name in spans}, dtypes, spans)
    others = stored.shapes.keys() - {tensor.name for tensor in layout}
    return Joined(released.where, {name: (placed, name) for name in spans} | {name: (stored, name) for name in others})


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float, float]:
    """Elements that differ, largest difference (infinite where just one is NaN), largest value."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0, 0.0, 0.0
    a, b = a.double(), b.double()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not differs.any():
        return 0, 0.0, 0.0
    by = (a - b).abs()[differs].nan_to_num(nan=float("inf"))
    values = torch.cat([a, b]).abs()
    finite = values[values.isfinite()]
    return int(differs.sum()), float(by.max()), float(finite.max()) if finite.numel() else 0.0
