"""The miniature's claims by the median of several seeds, as a Markdown table.

python -m tools.miniature.medians runs/miniature/seed_0 runs/miniature/seed_1 runs/miniature/seed_2
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megablip.errors import ConfigError
from tools.errors import errors_end_the_program
from tools.miniature.claims import Claim


def medians(runs: list[list[Claim]]) -> list[Claim]:
    """Each claim with the median as its value, and the values of all runs as its detail."""
    return [
        replace(
            claims[0],
            value=statistics.median(claim.value for claim in claims),
            detail=", ".join(f"{claim.value:.3f}" for claim in claims),
        )
        for claims in zip(*runs, strict=True)
    ]


def read(folder: Path) -> list[Claim]:
    """What the chain that ran in a folder found.

    Raises:
        ConfigError: it has not ended there.
    """
    file = folder / "report" / "claims.json"
    if not file.is_file():
        raise ConfigError("no report of the miniature", where=str(file), remedy="run the chain to its end there")
    entries = json.loads(file.read_text(encoding="utf-8"))
    return [Claim(**{key: value for key, value in entry.items() if key != "holds"}) for entry in entries]


def main(
    folders: Annotated[list[Path], typer.Argument(help="Where the chain ran, each time with another seed.")],
) -> None:
    """Print the medians of the claims."""
    with errors_end_the_program():
        found = medians([read(folder) for folder in folders])
    typer.echo(f"| stage | what | median of {len(folders)} | goal | reached | each |\n|---|---|---|---|---|---|")
    for claim in found:
        cells = (
            claim.stage,
            claim.what,
            f"{claim.value:.3f}",
            claim.goal,
            "yes" if claim.holds else "no",
            claim.detail,
        )
        typer.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
