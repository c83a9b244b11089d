"""Pages that a person looks at: one self-contained HTML file each, with one look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

from megablip.errors import ConfigError


def write_page(path: Path, template: str, folder: Path | None = None, **values: Any) -> None:
    """Fill in a template; all values are text and never markup.

    Args:
        folder: of the template, which may extend one of this package's; None: it is one of this package's.

    Raises:
        ConfigError: the file can't be written.
    """
    loaders = [*([FileSystemLoader(folder)] if folder else []), PackageLoader("megablip", "pages")]
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(template).render(**values)
    try:
        # The key of a sample may hold bytes that are no text.
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the page can't be written: {error.strerror}", where=str(path)) from None
