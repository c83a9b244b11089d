"""Virtual environments of rivals, made once under a cache folder of the user.

A rival may want other versions than we do, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megablip-bench"


def venv(name: str, requirements: list[str]) -> Path:
    """Python of an environment with the requirements, which are installed one after another.

    Args:
        name: of its folder under CACHE; another list of requirements is installed on top.

    Raises:
        RuntimeError: an installation failed.
    """
    folder = CACHE / name
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"making {folder} with {', '.join(requirements)}: once, some minutes", file=sys.stderr, flush=True)
    call([sys.executable, "-m", "venv", str(folder)])
    for requirement in requirements:
        call([str(python), "-m", "pip", "install", "--quiet", requirement])
    done.write_text(wanted)
    return python


def call(command: list[str]) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return result.stdout
