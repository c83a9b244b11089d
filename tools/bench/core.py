"""What benches share: rows and their goals, the clock, the printing."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Column, Table


class Rival(NamedTuple):
    """What does the same job elsewhere, measured in the same run and unit."""

    name: str
    value: float


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        better: which way `value` improves; gives the sense of the ratio and of the goal.
        goal: bound of `ratio` where there is a rival, else of `value`.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    goal: float
    rival: Rival | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better than the rival."""
        if self.rival is None:
            return None
        return self.value / self.rival.value if self.better == "higher" else self.rival.value / self.value

    @property
    def goal_text(self) -> str:
        if self.rival:
            return f"ratio >= {self.goal:,g}"
        return f"{'>=' if self.better == 'higher' else '<='} {self.goal:,g} {self.unit}".rstrip()

    @property
    def ok(self) -> bool:
        if self.rival:
            return bool(self.ratio >= self.goal)
        return bool(self.value >= self.goal if self.better == "higher" else self.value <= self.goal)


def run(benches: Mapping[str, Callable[[], list[Row]]]) -> int:
    """Print the machine, a table for each bench and, last, a line of JSON; 0 if every goal was reached, else 1."""
    print(machine(), flush=True)
    results = {}
    for name, bench in benches.items():
        table = Table(Column("row", no_wrap=True), "value", "rival", "ratio", "goal", "ok", title=name)
        for row in bench():
            value, ok = f"{_number(row.value)} {row.unit}", "ok" if row.ok else "!!"
            rival = f"{_number(row.rival.value)} {row.unit} ({row.rival.name})" if row.rival else ""
            table.add_row(row.name, value, rival, f"{row.ratio:.2f}" if row.rival else "", row.goal_text, ok)
            results[f"{name}.{row.name}"] = {"value": row.value, "goal": row.goal_text, "ok": row.ok}
        Console().print(table)
    print(json.dumps(results), flush=True)
    return 0 if all(result["ok"] for result in results.values()) else 1


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def median_seconds(variants: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median time of a call of each variant, after one call of each to warm up.

    The variants take turns, so that a busy moment of a shared machine or a change
    of its clock falls on all of them; a median of at least five drops the rest.
    """
    if repeats < 5:
        raise ValueError(f"a median of {repeats} says little; use at least 5")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def machine() -> str:
    """The machine in a line: processor, cores that we may use, torch and its threads."""
    import torch  # here: it takes seconds, and help needs none of it

    processor = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{processor[1] if processor else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}"
    )
