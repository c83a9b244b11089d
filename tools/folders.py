"""Folders that appear only when they are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megablip.errors import ConfigError


@contextmanager
def complete_folder(out: Path, mark: str, settings: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a new folder to fill, which takes the place of `out` at the end.

    A run that is killed leaves `out` as it was.  An earlier product, known by
    the file `mark` in it, is replaced; a folder of anything else is refused.

    Args:
        settings: what the product is made with, as JSON has it; kept in settings.json.  A folder that a run with the
            same settings has left unfinished is yielded again, to be gone on with.

    Raises:
        ConfigError: `out` is something that this program did not make, or is unfinished with other settings.
    """
    if out.exists() and not (out / mark).is_file():
        raise ConfigError(
            f"the folder exists and has no {mark}, so it is not ours to replace",
            where=str(out),
            remedy="name another folder",
        )
    partial = out.with_name(out.name + ".partial")
    if settings is None or not (partial / "settings.json").is_file():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if settings is not None:
            write_whole(partial / "settings.json", json.dumps(settings, indent=1))
    elif json.loads((partial / "settings.json").read_text()) != settings:
        raise ConfigError(
            "the folder is unfinished, and was begun with other settings",
            where=str(partial),
            remedy="give those in its settings.json to go on, or delete it to begin anew",
        )
    yield partial
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a kill."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
