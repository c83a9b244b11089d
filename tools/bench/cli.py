"""The command line: how long it takes to answer when no rank is to be started."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench.core import Row, median_seconds

MEGABLIP = str(Path(sys.executable).with_name("megablip"))
RECIPE = Path(__file__).parents[2] / "megablip" / "recipes" / "mini" / "pretrain.yaml"


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "typo.yaml"
        recipe.write_text(RECIPE.read_text() + "optimiser: {}\n")
        calls = {
            "unknown_key": lambda: answer("train", str(recipe), code=1, text="unknown key 'optimiser'"),
            "help": lambda: answer("--help", code=0, text="Usage"),
        }
        return [Row(name, value, "s", "lower", goal=2.0) for name, value in median_seconds(calls).items()]


def answer(*arguments: str, code: int, text: str) -> None:
    """Run `megablip`; RuntimeError if it ends with another code or `text` is not in what it prints."""
    result = subprocess.run([MEGABLIP, *arguments], capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != code or text not in output:
        raise RuntimeError(f"megablip {' '.join(arguments)} ended with {result.returncode}, not {code}:\n{output}")
