"""Show how a run is started.

python -m launcher print RECIPE [key.subkey=value ...]
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megablip.config import load_config
from megablip.errors import MegablipError
from megablip.launch import launcher_command, prepare_run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def programs() -> None:
    """Starts runs; so far on one machine."""


@app.command("print")
def print_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")] = None,
) -> None:
    """Check a recipe, write its resolved form into the run directory, and print the command that starts the ranks."""
    config = load_config(recipe, overrides or [])
    print(shlex.join(launcher_command(config, prepare_run(config))))


if __name__ == "__main__":
    try:
        app()
    except MegablipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
