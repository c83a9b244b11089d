"""Index shards, and find what is wrong with them.

    python -m tools.shards index SPEC... [--jobs N]
    python -m tools.shards lint SPEC... [--jobs N]

A SPEC is a path, a folder, a glob, braces such as `part-{000..099}.tar`, or a URL.
`index` writes the index beside each local shard that has none.  `lint` walks every
shard to the end and changes nothing; it prints a line for each finding, and ends
with 1 if there is any.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from megablip.data.cache import ShardCache, is_url
from megablip.data.index import count_samples, index_path, open_shard, read_head, valid_head
from megablip.data.shards import MAX_MEMBER_BYTES, MAX_SAMPLE_BYTES, expand_shards
from megablip.data.tar import USUAL_SHARE, Walk, split_name, walk
from megablip.errors import ShardError, printable
from tools.errors import errors_end_the_program

EXAMPLES = 3  # of samples with unusual members that are named; the others are counted
PADDING_BYTES = 10_240  # tar programs fill their last record, of 20 blocks, with zeros

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Specs = Annotated[list[str], typer.Argument(help="Shards: paths, folders, globs, braces or URLs.", metavar="SPEC...")]
Jobs = Annotated[int, typer.Option(help="Processes that walk shards.", min=1)]
JOBS = len(os.sched_getaffinity(0))


class Finding(NamedTuple):
    """Something wrong with a shard."""

    path: str
    offset: int  # bytes from its start; -1 where it is no matter of a place
    what: str
    remedy: str


class Summary(NamedTuple):
    """What lint found in a shard."""

    findings: list[Finding]
    samples: int = 0
    size_bytes: int = 0
    extensions: Counter[str] | None = None  # how many samples have each


def lint_shard(path: str, cache: ShardCache | None = None) -> Summary:
    """Walk a shard, by a copy in the cache where it is remote, and say what is wrong with it and with its index."""
    local, clashes = path, []
    try:
        if cache and is_url(path):
            local = cache.path(path)
            file = cache.open(path)
            cache.fetch_index(path)
        else:
            file = open_shard(path)
        with file:
            found = walk(path, file, clashes.append)
            stale = valid_head(local, file) is None
    except ShardError as error:
        return Summary([_of_error(path, error)])
    of_keys = [_of_error(path, clash) for clash in clashes] or _of_index(path, local, found, stale)
    findings = [*of_keys, *_of_walk(path, found), *_of_samples(path, found)]
    extensions = Counter(member[0] for sample in found.samples for member in sample)
    return Summary(findings, len(found.samples), found.size_bytes, extensions)


def _of_error(path: str, error: ShardError) -> Finding:
    return Finding(path, -1, f"{error.what} ({error.where})", error.remedy)


def _of_index(path: str, local: str, found: Walk, stale: bool) -> Iterator[Finding]:
    index, remedy = index_path(path), f"python -m tools.shards index {path}"
    if is_url(path):
        remedy = "index a local copy, and put the .idx beside the shard"
    head = read_head(local)
    if head is None:
        there = os.path.exists(index_path(local))
        yield Finding(path, -1, f"{index} is no index" if there else "it has no index", remedy)
    elif stale:
        yield Finding(path, -1, f"the index is stale: {index} is of a shard of another size or time", remedy)
    elif head.headers and (head.headers, head.samples) != (found.headers, len(found.samples)):
        yield Finding(path, -1, f"the shard's headers changed since {index} was made", f"delete it, and {remedy}")
    elif head.samples != len(found.samples):
        yield Finding(path, -1, f"{index} has {head.samples} samples of {len(found.samples)}", remedy)


def _of_walk(path: str, found: Walk) -> Iterator[Finding]:
    for damage in found.damage:
        yield Finding(path, damage.offset, str(damage), "copy or write the shard again; training goes around it")
    if not found.has_end and not found.damage:
        what = "the end-of-archive block is missing: the shard may be cut between two samples"
        yield Finding(path, found.size_bytes, what, "compare its size with the original's, or write it again")
    elif found.size_bytes - found.end > PADDING_BYTES + 512:
        zeros = found.size_bytes - found.end
        yield Finding(path, found.end, f"{zeros} bytes of zeros at the end", "was it copied to its end? compare it")


def _of_samples(path: str, found: Walk) -> Iterator[Finding]:
    kinds = Counter(frozenset(member[0] for member in sample) for sample in found.samples)
    usual, count = kinds.most_common(1)[0]
    unusual = 0
    for sample in found.samples:
        for extension, offset, size, name in sample:
            if size > MAX_MEMBER_BYTES:
                what = f"'{name}' has {size} bytes, above the limit of {MAX_MEMBER_BYTES}"
                yield Finding(path, offset, what, f"make the .{extension} smaller, or its sample is skipped")
        total = sum(size for _, _, size, _ in sample)
        if total > MAX_SAMPLE_BYTES:
            what = f"key '{split_name(sample[0][3])[0]}' has {total} bytes, above the limit of {MAX_SAMPLE_BYTES}"
            yield Finding(path, sample[0][1], what, "make its members smaller, or it is skipped")
        missing = usual - {member[0] for member in sample}
        if missing and count >= USUAL_SHARE * len(found.samples):
            unusual += 1
            if unusual <= EXAMPLES:
                what = f"key '{split_name(sample[0][3])[0]}' lacks .{', .'.join(sorted(missing))}, which others have"
                yield Finding(path, sample[0][1], what, "complete the sample, or take it out")
    if unusual > EXAMPLES:
        what = f"{unusual - EXAMPLES} more keys lack members that others have"
        yield Finding(path, -1, what, "see how the shard was written")


@app.command()
def index(specs: Specs, jobs: Jobs = JOBS) -> None:
    """Write the index of each shard that has none."""
    with errors_end_the_program():
        paths = expand_shards(specs)
        remote = [path for path in paths if is_url(path)]
        if remote:
            remedy = "index local copies, and put the .idx files beside the shards"
            raise ShardError("an index can't be written beside a URL", where=remote[0], remedy=remedy)
        with Progress(transient=True) as progress:
            counts = count_samples(paths, jobs, progress)
        heads = [read_head(path) for path in paths]
        damaged, missing = sum(bool(head and head.damage) for head in heads), heads.count(None)
        typer.echo(
            f"{len(paths)} shards, {sum(counts)} samples"
            + (f", {damaged} damaged: run lint" if damaged else "")
            + (f", {missing} without an index: it can't be written, or a name holds white space" if missing else "")
        )


@app.command()
def lint(specs: Specs, jobs: Jobs = JOBS) -> None:
    """Walk shards and print what is wrong with them."""
    with errors_end_the_program():
        paths = expand_shards(specs)
        with tempfile.TemporaryDirectory() as folder:  # copies of remote shards, a few at a time
            summaries = _lint_all(paths, jobs, ShardCache(folder, shutil.disk_usage(folder).free // 2))
    for finding in (finding for summary in summaries for finding in summary.findings):
        place = f", offset {finding.offset}" if finding.offset >= 0 else ""
        line = f"{finding.path}{place}: {finding.what}; to do: {finding.remedy}"
        typer.echo(printable(line).replace("\n", "\\n"))
    _print_table(paths, summaries)
    raise typer.Exit(any(summary.findings for summary in summaries))


def _lint_all(paths: list[str], jobs: int, cache: ShardCache) -> list[Summary]:
    with Progress(transient=True) as progress:
        lint_one = partial(lint_shard, cache=cache)
        if jobs == 1 or len(paths) == 1:
            return list(progress.track(map(lint_one, paths), total=len(paths), description="walking shards"))
        with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("spawn")) as pool:
            return list(progress.track(pool.map(lint_one, paths), total=len(paths), description="walking shards"))


def _print_table(paths: list[str], summaries: list[Summary]) -> None:
    table = Table("shards", "samples", "bytes", "findings", "members of samples")
    extensions = sum((summary.extensions for summary in summaries if summary.extensions), Counter())
    members = ", ".join(f".{extension} {count:,}" for extension, count in extensions.most_common(8))
    samples = sum(summary.samples for summary in summaries)
    size = sum(summary.size_bytes for summary in summaries)
    findings = sum(len(summary.findings) for summary in summaries)
    table.add_row(
        *(f"{total:,}" for total in (len(paths), samples, size, findings)),
        Text(printable(members).replace("\n", "\\n")),
    )
    Console().print(table)


if __name__ == "__main__":
    app()
