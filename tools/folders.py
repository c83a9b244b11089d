"""Folders that appear only when they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megablip.errors import ConfigError


@contextmanager
def complete_folder(out: Path, mark: str) -> Iterator[Path]:
    """Yield a new folder to fill, which takes the place of `out` at the end.

    A run that is killed leaves `out` as it was.  An earlier product, known by
    the file `mark` in it, is replaced; a folder of anything else is refused.

    Raises:
        ConfigError: `out` is something that this program did not make.
    """
    if out.exists() and not (out / mark).is_file():
        raise ConfigError(
            f"the folder exists and has no {mark}, so it is not ours to replace",
            where=str(out),
            remedy="name another folder",
        )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
