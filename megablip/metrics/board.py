"""What a run writes down: TensorBoard, metrics.jsonl, and a line on the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megablip.metrics.layout import custom_scalars
from megablip.metrics.points import read_metrics


class Board:
    """Writes scalars of each step; made by the first rank only.

    On resume everything after `start_step` is taken back, in TensorBoard by
    `purge_step`, so that no curve doubles.

    Args:
        start_step: steps done when this attempt begins.
        config: the resolved recipe, shown as text.
        without_charts: titles of charts that would stay empty.
    """

    def __init__(self, run_dir: Path, start_step: int, config: str, without_charts: tuple[str, ...] = ()):
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        path = run_dir / "metrics.jsonl"
        kept = [point for point in read_metrics(run_dir) if point["step"] <= start_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(point) + "\n" for point in kept))
        os.replace(temporary, path)  # a full disk must not cost the curve so far
        self._stream = path.open("ab", buffering=0)
        self._unwritten = b""  # what a full disk has not taken yet
        self._warned = False
        self._tensorboard.add_text("config", f"```yaml\n{config}```", start_step)
        self._tensorboard.add_custom_scalars(custom_scalars(without_charts))

    def write(self, step: int, scalars: dict[str, float], **words: str) -> None:
        """One point of each scalar; `words` go to metrics.jsonl alone.

        A full disk is reported once and does not stop the run; the points of
        metrics.jsonl that it refuses are written as soon as it takes them.
        """
        self._unwritten += json.dumps({"step": step, **scalars, **words}).encode() + b"\n"
        try:
            self._write_points()
            # One event for all: with 60 of them it takes 0.1 ms instead of 2.
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._tensorboard.file_writer.add_summary(Summary(value=values), step)
        except OSError as error:
            self._report(error)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture, in TensorBoard."""
        png = io.BytesIO()
        picture.save(png, "PNG", compress_level=1)  # the loop waits for it
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=png.getvalue()
        )
        try:
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            self._tensorboard.file_writer.add_summary(summary, step)
        except OSError as error:
            self._report(error)

    def note(self, step: int, name: str, text: str) -> None:
        """Words about a step, for TensorBoard's text page."""
        try:
            self._tensorboard.add_text(name, text, step)
        except OSError as error:
            self._report(error)

    def close(self) -> None:
        for last in (self._write_points, self._stream.close, self._tensorboard.close):
            try:
                last()
            except OSError as error:
                self._report(error)

    def _write_points(self) -> None:
        while self._unwritten:
            written = self._stream.write(self._unwritten)
            self._unwritten = self._unwritten[written:]

    def _report(self, error: OSError) -> None:
        if not self._warned:
            print(f"metrics can't be written: {error}; training goes on", file=sys.stderr, flush=True)
        self._warned = True


class ProgressLine:
    """One line that is rewritten on a terminal, and repeated every 10 s elsewhere."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._last = 0.0
        self._started = time.monotonic()
        self._first_share: float | None = None

    def show(self, step: int, share: float, facts: dict[str, str]) -> None:
        """Args: share: how much of the whole duration is done, 0 to 1."""
        now = time.monotonic()
        if self._first_share is None:
            self._first_share, self._started = share, now
        if now - self._last < (0.5 if self._on_terminal else 10.0) and share < 1:
            return
        self._last = now
        gained = share - self._first_share
        left = f"{_span((now - self._started) * (1 - min(share, 1)) / gained)} left" if gained > 0 else "..."
        line = " | ".join([f"step {step}", f"{min(share, 1):4.0%}", *(f"{k} {v}" for k, v in facts.items()), left])
        print(f"\r\033[K{line}" if self._on_terminal else line, end="" if self._on_terminal else "\n", flush=True)


def _span(seconds: float) -> str:
    """A time as people say it: 90 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
