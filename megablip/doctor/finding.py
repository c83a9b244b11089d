"""What a check of a machine, a recipe or a node finds, and the table of many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megablip.errors import MegablipError, printable

LOG_COLUMNS = 160


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        subject: what was looked at.
        found: what was found.
        ok: whether a run may start.
        remedy: what to do if it is not right.
        means: what follows from it, where that is not plain.
        warns: it may start, but something is not as it should be.
        node: that it is about; empty: this machine, or all.
    """

    subject: str
    found: str
    ok: bool = True
    remedy: str = ""
    means: str = ""
    warns: bool = False
    node: str = ""

    def on(self, node: str) -> Finding:
        return replace(self, node=node)

    @property
    def mark(self) -> str:
        return "!!" if not self.ok else "??" if self.warns else "ok"


def attempted(subject: str, check: Callable[[], Iterable[Finding]], means: str = "") -> list[Finding]:
    """What `check` finds; its error as a finding."""
    try:
        return list(check())
    except MegablipError as error:
        where = f" ({error.where})" if error.where else ""
        return [Finding(subject, f"{error.what}{where}", ok=False, remedy=error.remedy, means=means)]
    except OSError as error:
        return [Finding(subject, str(error), ok=False, remedy="check the path and its permissions", means=means)]


def show(findings: list[Finding], console: Console | None = None) -> None:
    """The table; a column for nodes only where there are any."""
    nodes = any(finding.node for finding in findings)
    table = Table("", *(["node"] if nodes else []), "what", "found", "what it means", "to do")
    for finding in findings:
        cells = [finding.mark, *([finding.node] if nodes else [])]
        cells += [finding.subject, finding.found, finding.means, finding.remedy]
        table.add_row(*(escape(printable(cell)) for cell in cells))
    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a log
        console.width = LOG_COLUMNS
    console.print(table)
