"""Reads RUN/metrics.jsonl; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The points of RUN/metrics.jsonl; a line cut off by a crash is left out."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    points = []
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and isinstance(point.get("step"), int):
            points.append(point)
    return points


def last_step(run_dir: Path) -> int:
    """Of the newest point, which is at most `log.every_steps` behind the run; 0 if there is none."""
    return max((point["step"] for point in read_metrics(run_dir)), default=0)
