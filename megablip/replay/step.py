"""`megablip replay RUN --step N`: what a step was trained on, and what its loss was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megablip.metrics.points import read_metrics
from megablip.replay.batch import ReplayedStep, rebuild

Weights = Literal["step", "checkpoint", "none"]


def replay(run_dir: Path, number: int, page: Path, weights: Weights) -> bool:
    """Rebuild a step, list its samples, write the page, compute its loss.

    Args:
        number: of the step, from 1 on, as in metrics.jsonl.
        page: HTML file to write.
        weights: that the loss is computed with: those that the step began with,
            trained up to from the checkpoint before where that is earlier;
            those of the checkpoint before; or no loss.

    Returns:
        Whether the data are those that the run has logged for the step.

    Raises:
        MegablipError: what the parts raise.
    """
    console = Console()

    def say(text: str) -> None:
        console.print(Text(text))

    step = rebuild(run_dir, number, say)
    logged: dict[str, Any] = next((point for point in read_metrics(run_dir) if point["step"] == number), {})
    facts = [("data", _rebuilt_from(step)), ("digest", _compared(step.digest, logged.get("data_digest")))]
    losses = None
    if weights != "none":
        losses, (loss, computed_with) = _losses(step, weights, say)
        facts.append(("loss of tokens", f"{loss:.6f}, {computed_with}"))
        facts.append(("loss that was logged", _logged_loss(logged.get("token_loss", logged.get("loss")), loss)))
    console.print(_table(step, losses))
    for name, value in facts:
        say(f"{name}: {value}")
    # Imported late: a page needs Pillow and the tokenizer, a mistake is named before that.
    from megablip.replay.page import write_replay

    write_replay(page, step, losses, facts)
    say(f"page: {page}")
    return logged.get("data_digest") in (None, step.digest)


def _losses(step: ReplayedStep, weights: Weights, say: Any) -> tuple[list[list[float]], tuple[float, str]]:
    """Mean loss of each document of each sequence; that of the step, and with which weights."""
    from megablip.replay.loss import document_losses, weights_before

    before = step.checkpoint.folder.name if step.checkpoint else "the beginning"
    if weights == "checkpoint":
        sums = document_losses(step, step.checkpoint.folder if step.checkpoint else None)
        how = f"with the weights of {before}, "
        how += f"older by {step.steps_before} than the step's own" if step.steps_before else "which the step began with"
    else:
        with weights_before(step, say) as folder:
            sums = document_losses(step, folder)
        how = "with the weights that the step began with"
        if step.steps_before:
            how += (
                f": trained on from {before} by {step.steps_before}, on one process, so they are equal up to rounding"
            )
    total, labels = (sum(float(of[row].sum()) for of in sums) for row in (0, 1))
    means = [[loss / count if count else math.nan for loss, count in of.T.tolist()] for of in sums]
    return means, (total / max(labels, 1), f"{how} ({step.config.engine.precision})")


def _rebuilt_from(step: ReplayedStep) -> str:
    start = step.checkpoint.folder.name if step.checkpoint else "the beginning of the run"
    sequences, documents = len(step.sequences), sum(len(sequence.samples) for sequence in step.sequences)
    return f"{documents} documents in {sequences} sequences, planned from {start}"


def _compared(digest: str, logged: str | None) -> str:
    if logged is None:
        return f"{digest}; none is logged for this step"
    if digest == logged:
        return f"{digest}, the one that was logged"
    return f"{digest}, but {logged} was logged: shards, tokenizer or recipe are not what they were"


def _logged_loss(logged: float | None, loss: float) -> str:
    if logged is None:
        return "none for this step"
    return f"{logged:.6f}, relative difference {abs(loss - logged) / max(abs(logged), 1e-12):.1e}"


def _table(step: ReplayedStep, losses: list[list[float]] | None) -> Table:
    table = Table()
    for name in ("lane", "sequence", "source", "key", "shard", "tokens", "trained", "tiles", "loss"):
        table.add_column(name, overflow="fold")
    for number, sequence in enumerate(step.sequences):
        for place, sample in enumerate(sequence.samples):
            loss = losses[number][place] if losses else math.nan
            row = [sequence.packed.lane, sequence.packed.index, sample.source, sample.key, Path(sample.shard).name]
            row += [sample.tokens, sample.labels, sample.tiles, f"{loss:.4f}" if math.isfinite(loss) else ""]
            table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def printable(text: str) -> str:
    """Text whose control characters can't reach the terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
