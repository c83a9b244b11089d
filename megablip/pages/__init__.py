"""Pages that a person looks at: one self-contained HTML file each, with one look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megablip.errors import ConfigError


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder; all values are text and never markup.

    Raises:
        ConfigError: the file can't be written.
    """
    environment = Environment(loader=PackageLoader("megablip", "pages"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(template).render(**values)
    try:
        # The key of a sample may hold bytes that are no text.
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the page can't be written: {error.strerror}", where=str(path)) from None
