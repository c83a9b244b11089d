"""What a checkpoint holds, told from manifests and headers: no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megablip.checkpoint.commit import manifest_of, newest_committed
from megablip.checkpoint.slices import SliceReader
from megablip.convert.kinds import is_committed, open_weights


def inspect(source: Path, depth: int = 3) -> None:
    """Print what a checkpoint of any kind is, and its tensors by the first `depth` parts of their names.

    Raises:
        CheckpointError: it can't be read.
    """
    console = Console()
    if is_committed(source):
        folder = source if (source / "COMMITTED").exists() else newest_committed(source)
        console.print(_summary(folder))
        tensors = SliceReader(folder)
    else:
        tensors = open_weights(source)
    console.print(_tree(tensors.shapes, tensors.dtypes, depth))


def _summary(folder: Path) -> Table:
    files, state = manifest_of(folder)
    config = state.get("config", {})
    table = Table("", "", show_header=False)
    table.add_row("checkpoint", str(folder))
    table.add_row("step", f"{state.get('step', 0):,}")
    for name, value in state.get("progress", {}).items():
        if name != "step":
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    table.add_row("ranks", str(state.get("world", "unknown")))
    table.add_row("stage", str(config.get("stage", "unknown")))
    table.add_row("began with", str(config.get("model", {}).get("path", "unknown")))
    table.add_row("files", f"{len(files)}, {_bytes(sum(file['size'] for file in files.values()))}")
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in state.get("versions", {}).items()))
    return table


def _tree(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], depth: int) -> Table:
    table = Table("tensors", "number", "elements", "size", "dtypes")
    for column in table.columns[1:4]:
        column.justify = "right"
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        for length in range(min(depth, len(parts)) + 1):
            groups.setdefault(tuple(parts[:length]), []).append(name)
    for path, names in sorted(groups.items(), key=lambda item: [_number(part) for part in item[0]]):
        counts = [math.prod(shapes[name]) for name in names]
        size = sum(count * dtypes[name].itemsize for name, count in zip(names, counts, strict=True))
        kinds = sorted({str(dtypes[name]).removeprefix("torch.") for name in names})
        label = "  " * len(path) + path[-1] if path else "all"
        if len(names) == 1 and ".".join(path) == names[0]:
            label += f" {list(shapes[names[0]])}"
        table.add_row(label, f"{len(names):,}", f"{sum(counts):,}", _bytes(size), ", ".join(kinds))
    return table


def _number(part: str) -> tuple[int, str]:
    """Layer 10 after layer 9."""
    return (int(part), "") if part.isdecimal() else (-1, part)


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
