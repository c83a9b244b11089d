"""A page a person looks at: loss curve, table, images beside their answers."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from megablip.pages import write_page

WIDTH, HEIGHT = 720, 240  # of the curve, pixels


def write_report(
    path: Path,
    *,
    title: str,
    metrics: list[dict[str, Any]],
    group: str,
    groups: dict[str, dict[str, float]],
    pictures: list[tuple[bytes | None, Any]],
) -> None:
    """Write one self-contained HTML file.

    Args:
        metrics: points with `tokens_seen` and `loss`; empty for a page without a curve.
        group: what the groups are told apart by.
        groups: what evaluate.evaluation.summarize returns.
        pictures: image files' bytes, each with its answer; None for an answer without an image.
    """
    write_page(
        path,
        "report.html.j2",
        title=title,
        curve=curve([(point["tokens_seen"], point["loss"]) for point in metrics]),
        group=group,
        groups=groups,
        pictures=[(data and base64.b64encode(data).decode(), answer) for data, answer in pictures],
        width=WIDTH,
        height=HEIGHT,
    )


def curve(points: list[tuple[float, float]]) -> dict[str, Any] | None:
    """The points in pixels of the drawing, smoothed over 1 % of them."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return None
    window = max(1, len(points) // 100)
    xs = [x for x, _ in points]
    raw = [y for _, y in points]
    ys = [sum(raw[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(raw))]
    low, high, last = min(ys), max(ys), max(xs)
    span = (high - low) or 1.0
    line = " ".join(f"{WIDTH * x / last:.1f},{HEIGHT * (high - y) / span:.1f}" for x, y in zip(xs, ys, strict=True))
    return {"line": line, "low": low, "high": high, "last": last}
