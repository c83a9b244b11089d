"""The list of samples that were not used, and when they are too many."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megablip.errors import SampleError
from megablip.records import Skip

ALWAYS_ALLOWED = 32  # bad samples of a source
ALLOWED_SHARE = 1000  # and one in so many


class Quarantine:
    """Writes skipped samples to RUN/quarantine.jsonl, one line each, and counts them.

    A sample that comes again, in a later epoch or because the run went back to
    a checkpoint, counts once: what the file lists already is counted by the first rank alone.

    Args:
        path: file that lines are appended to, by all ranks.
        is_first: whether this is the first rank.
    """

    def __init__(self, path: Path, is_first: bool):
        self.path = path
        self._seen = {_identity(line) for line in self._lines()}
        self.counts: dict[str, int] = {}
        """Bad samples of each source that this rank counts."""
        if is_first:
            for source, *_ in self._seen:
                self._count(source)

    def add(self, step: int, skipped: tuple[Skip, ...]) -> None:
        """Write down what was skipped on the way to a step."""
        lines = [
            {"step": step, "source": s.source, "shard": s.shard, "key": s.key, "offset": s.offset, "error": s.error}
            for s in skipped
        ]
        if lines:
            self._append("".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            if _identity(line) not in self._seen:
                self._seen.add(_identity(line))
                self._count(line["source"])

    def check(self, bad: Mapping[str, int], drawn: Mapping[str, int], totals: Mapping[str, int]) -> None:
        """Compare the bad samples of each source, over all ranks, with what is allowed: max(32, 0.1 %) of its samples.

        Args:
            drawn: samples of each source so far, over all ranks; stand for the size of one that is not counted.
            totals: samples of each source that is counted.

        Raises:
            SampleError: too many, with the last of the list.
        """
        for source, count in bad.items():
            limit = max(ALWAYS_ALLOWED, totals.get(source, drawn[source]) // ALLOWED_SHARE)
            if count > limit:
                lines = [line for line in self._lines() if line["source"] == source][-5:]
                last = [f"  {line['shard']}, key {line['key']}: {line['error'].splitlines()[0]}" for line in lines]
                raise SampleError(
                    f"{count} bad samples, more than the {limit} allowed; the last:\n" + "\n".join(last),
                    where=f"source {source}",
                    remedy=f"see {self.path}; repair the source or take it out, then move that file away",
                )

    def _count(self, source: str) -> None:
        self.counts[source] = self.counts.get(source, 0) + 1

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        for row in text.splitlines():
            try:
                line = json.loads(row)
                _identity(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut as the disk filled up
            yield line

    def _append(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text.encode())  # in one piece: other ranks append, too
            finally:
                os.close(descriptor)
        except OSError as error:  # a full disk: no reason to stop training
            print(f"can't write {self.path}: {error}; the skipped samples:\n{text}", file=sys.stderr, flush=True)


def _identity(line: dict[str, Any]) -> tuple[str, str, str, int]:
    return line["source"], line["shard"], line["key"], line["offset"]
