"""What the programs of tools/ do where something is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from megablip.errors import MegablipError, SampleError

MOST_TOLD = 20  # of what is left out for one reason; the others are counted


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """An error of ours is one message on stderr, and exit code 1."""
    try:
        yield
    except MegablipError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def leave_out(which: str, why: str, error: SampleError, counts: Counter[str]) -> None:
    """Count a sample that can't be used under `why`; the first few are told on stderr."""
    counts[f"left out: {why}"] += 1
    if counts[f"left out: {why}"] <= MOST_TOLD:
        typer.echo(f"left out: {which}: {error.what}", err=True)
