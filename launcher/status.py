"""`python -m launcher status RUN`: the attempts of a run as a table."""

from __future__ import annotations

import statistics
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megablip.engine.status import RunStatus
from megablip.errors import ConfigError
from megablip.metrics.points import read_metrics

NODES_SHOWN = 3
WIDTH = 160


def show_status(run_dir: Path, console: Console | None = None) -> None:
    """Print when each attempt ran, where, from which step to which, with what loss and speed, and how it ended.

    Raises:
        ConfigError: no run has begun there.
    """
    # Into a file or a pipe the table goes whole.
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    attempts = RunStatus(run_dir).attempts
    if not attempts:
        raise ConfigError("no run has begun here", where=str(run_dir), remedy="give the run_dir of a recipe")
    points = read_metrics(run_dir)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("attempt", "started", "took", "job", "nodes", "ranks", "steps", "loss", "tokens/s", "outcome"):
        table.add_column(heading, justify="right" if heading in ("took", "ranks", "loss", "tokens/s") else "left")
    for attempt in attempts:
        table.add_row(*_row(attempt, points))
    console.print(table)
    for attempt in attempts:
        if reason := attempt.get("reason"):
            console.print(f"attempt {attempt.get('id', '?')}, {attempt.get('outcome')}: {reason}", markup=False)


def _row(attempt: dict[str, Any], points: list[dict[str, Any]]) -> list[str]:
    first, last = attempt.get("first_step"), attempt.get("last_step")
    if first is not None and last is None:  # it runs
        last = max((point["step"] for point in points), default=first)
    # Steps that a later attempt has trained again are its own in metrics.jsonl.
    own = [point for point in points if first is not None and first < point["step"] <= last]
    speeds = [point["tokens_per_s"] for point in own if "tokens_per_s" in point]
    job = attempt.get("job")
    restarts = attempt.get("restarts")
    return [
        str(attempt.get("id", "?")).partition("-")[0],
        str(attempt.get("started", "?"))[:19].replace("T", " "),
        _took(attempt),
        "" if job is None else f"{job}, restart {restarts}" if restarts else str(job),
        _nodes(attempt.get("nodes") or [attempt.get("host", "?")]),
        str(attempt.get("ranks", "?")),
        "none" if first is None else f"{first} to {last}",
        f"{own[-1]['loss']:.4f}" if own and isinstance(own[-1].get("loss"), float) else "",
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        str(attempt.get("outcome", "?")),
    ]


def _took(attempt: dict[str, Any]) -> str:
    try:
        began = datetime.fromisoformat(attempt["started"])
        ended = datetime.fromisoformat(attempt["ended"]) if "ended" in attempt else datetime.now().astimezone()
    except (KeyError, ValueError, TypeError):
        return ""
    return str(timedelta(seconds=round((ended - began).total_seconds())))


def _nodes(nodes: list[str]) -> str:
    shown = ", ".join(nodes[:NODES_SHOWN])
    return shown if len(nodes) <= NODES_SHOWN else f"{shown} and {len(nodes) - NODES_SHOWN} more"
