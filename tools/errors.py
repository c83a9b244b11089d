"""How the programs of tools/ end where something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from megablip.errors import MegablipError


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """An error of ours is one message on stderr, and exit code 1."""
    try:
        yield
    except MegablipError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
