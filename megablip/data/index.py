"""The index of a shard: where its samples lie, as a text file beside it.

The format is that of NVIDIA DALI's `wds2idx`, version 1.2:

    v1.2 <number of samples> bytes=<size> end=<offset> headers=<fingerprint> [damaged=<range>,...]
    <extension> <offset> <size> <member name> [<extension> ...]     one line a sample

Offsets and sizes are bytes from the start of the tar.  What follows the number in
the first line is ours, and DALI passes over it: the size of the shard, where its
archive ends, a fingerprint of all its headers, and its damaged ranges, each written
`<offset>-<end>:<samples dropped>:<reason>` with `_` for a space.  `wds2idx` writes
none of these; its indexes are used, too.

A line is parsed when its sample is asked for.  An open index holds its text up to 2 MB, and 8 bytes a sample.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from rich.progress import Progress

from megablip.data.tar import BLOCK_BYTES, MAX_DAMAGES, Damage, Member, Walk, is_header_of, padded, split_name, walk
from megablip.errors import MegablipError, ShardError

CHUNK_SAMPLES = 64  # lines read at a time, where samples are read in order: those of a block
MAX_TEXT_BYTES = 2 << 20  # of an open index; of a longer one lines are read when asked for
MAX_HEAD_BYTES = 256 + MAX_DAMAGES * 128  # of the first line
MAX_LINE_BYTES = 1 << 16  # of the first and the last line; where one is longer, the index is made anew each time
PARALLEL_SHARDS = 8  # from so many shards on, processes that walk them are worth their start

_FAR = 1 << 62  # more bytes than a file has
_RANGE = re.compile(r"(\d{1,18})-(\d{1,18}):(\d{1,12}):([^\s,]{1,80})")


@dataclass(frozen=True, slots=True)
class IndexHead:
    """First line of an index. An index of another tool has neither size nor fingerprint."""

    samples: int
    size_bytes: int = -1  # of the shard; -1 if not known
    end: int = -1  # offset of its end-of-archive block; size_bytes where it has none
    headers: str = ""
    damage: tuple[Damage, ...] = ()

    @classmethod
    def of(cls, found: Walk) -> IndexHead:
        return cls(len(found.samples), found.size_bytes, found.end, found.headers, found.damage)

    @classmethod
    def parse(cls, line: bytes) -> IndexHead | None:
        """None if it is not the first line of an index."""
        match = re.fullmatch(rb"v1\.2 (\d{1,12})((?: [^ \n]+)*) *\n", line)
        if not match or not int(match[1]):
            return None
        fields = dict(field.partition("=")[::2] for field in match[2].decode("utf-8", "replace").split())
        numbers = (fields.get(name, "") for name in ("bytes", "end"))
        size, end = (int(number) if re.fullmatch(r"\d{1,18}", number) else -1 for number in numbers)
        damage = tuple(
            Damage(int(parts[1]), int(parts[2]), parts[4].replace("_", " "), int(parts[3]))
            for parts in _RANGE.finditer(fields.get("damaged", ""))
        )
        return cls(int(match[1]), size, end, fields.get("headers", ""), damage)

    def __bytes__(self) -> bytes:
        ranges = ",".join(f"{d.offset}-{d.end}:{d.samples}:{d.reason.replace(' ', '_')}" for d in self.damage)
        damaged = f" damaged={ranges}" if ranges else ""
        ours = f"bytes={self.size_bytes} end={self.end} headers={self.headers}{damaged}"
        return f"v1.2 {self.samples} {ours}\n".encode()


class ShardIndex:
    """Lines of an index: in memory, or in a file beside the shard where they are many.

    Args:
        head: the first line.
        ends: int64[samples + 1], where each line ends; [0] ends the first line.
        source: the text, or the descriptor of its file, which is closed with the index.
        separator: of a line's fields.
        is_saved: whether a file has the lines.
    """

    def __init__(self, head: IndexHead, ends: np.ndarray, source: int | bytes, separator: str, is_saved: bool):
        self.head, self._source, self._separator, self._is_saved = head, source, separator, is_saved
        self._ends = memoryview(ends)  # numpy is slow to give a single number
        self._lines: list[bytes] = []  # those read last, from that of sample `_first` on
        self._first = self._next = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def unsaved_bytes(self) -> int:
        """Memory of the lines, where no file has them; else 0."""
        return 0 if self._is_saved else len(self._source)

    @classmethod
    def in_memory(cls, found: Walk) -> ShardIndex:
        # Zeros part the fields: a name that a text line can't hold may have spaces and line ends.
        lines = [_line(sample, "\0") for sample in found.samples]
        return cls(IndexHead.of(found), np.cumsum([0, *map(len, lines)]), b"".join(lines), "\0", is_saved=False)

    @classmethod
    def from_file(cls, descriptor: int) -> ShardIndex | None:
        """None if it is no index, or its number of lines is not what the first line says."""
        found = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        text = np.frombuffer(found, np.uint8)
        ends = np.flatnonzero(text == ord("\n")) + 1
        head = IndexHead.parse(text[: min(ends[0], MAX_HEAD_BYTES)].tobytes()) if len(ends) else None
        if head is None or len(ends) != head.samples + 1 or ends[-1] != len(text):
            os.close(descriptor)
            return None
        if len(text) <= MAX_TEXT_BYTES:
            os.close(descriptor)
            return cls(head, ends, found, " ", is_saved=True)
        return cls(head, ends, descriptor, " ", is_saved=True)

    def sample(self, number: int) -> tuple[str, list[Member]] | None:
        """(key, members) of a sample; None if its line is not of the format, or not one webdataset sample."""
        if isinstance(self._source, bytes):
            return _parse_line(self._source[self._ends[number] : self._ends[number + 1]], self._separator)
        at = number - self._first
        if not 0 <= at < len(self._lines):
            # The samples of a block are asked for in order; where they are not, more lines would be of no use.
            self._lines = self._read_lines(number, CHUNK_SAMPLES if number == self._next else 1)
            self._first, at = number, 0
        self._next = number + 1
        return _parse_line(self._lines[at], self._separator)

    def _read_lines(self, first: int, count: int) -> list[bytes]:
        begin, *ends = self._ends[first : first + count + 1].tolist()
        text = os.pread(self._source, ends[-1] - begin, begin)
        return [text[start - begin : end - begin] for start, end in pairwise([begin, *ends])]

    def close(self) -> None:
        if not isinstance(self._source, bytes):
            os.close(self._source)


def _line(sample: list[Member], separator: str) -> bytes:
    fields = [field for extension, offset, size, name in sample for field in (extension, str(offset), str(size), name)]
    return separator.join(fields).encode("utf-8", "surrogateescape") + b"\n"


def _parse_line(line: bytes, separator: str) -> tuple[str, list[Member]] | None:
    fields = line[:-1].decode("utf-8", "surrogateescape").split(separator)
    count = len(fields)
    if count % 4:
        return None
    extension, name = fields[0], fields[3]
    if name.endswith("." + extension):
        key = name[: -len(extension) - 1]  # in half the time of split_name
    elif split := split_name(name):
        key = split[0]
    else:
        return None
    length, members = len(key) + 1, []
    prefix = key + "."
    try:
        for at in range(0, count, 4):
            offset, size, name = int(fields[at + 1]), int(fields[at + 2]), fields[at + 3]
            extension = name[length:].lower()  # wds2idx keeps the case
            if not name.startswith(prefix) or "/" in extension:
                return None
            if offset % BLOCK_BYTES or not (0 < offset < _FAR and 0 <= size < _FAR):
                return None
            members.append((extension, offset, size, name))
    except ValueError:
        return None
    return key, members


def index_path(path: str) -> str:
    """Where the index of a shard lies: `part-000.tar` has `part-000.idx`."""
    return path.removesuffix(".tar") + ".idx"


# --- making -------------------------------------------------------------------


def build_index(path: str, file: BinaryIO) -> ShardIndex:
    """Walk a shard and write its index beside it; in memory where the folder or a name does not allow it.

    Raises:
        ShardError: the shard can't be read, or is not one that samples can be read from.
    """
    found = walk(path, file)
    written = _is_text(found) and _write_index(index_path(path), found)
    return (load_index(path, file) if written else None) or ShardIndex.in_memory(found)


def _is_text(found: Walk) -> bool:
    """Whether the fields of a line can be told apart by spaces."""
    return all(extension and name.split() == [name] for sample in found.samples for extension, _, _, name in sample)


def _write_index(path: str, found: Walk) -> bool:
    """Write it at once and whole; False if it can't be, or a file of another format is there."""
    text = bytes(IndexHead.of(found)) + b"".join(_line(sample, " ") for sample in found.samples)
    try:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read(2) not in (b"v1", b""):
                return False
        folder, name = os.path.split(path)
        # It begins like the index, so that a cache knows whose it is.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name[:40]}", suffix=".idx.tmp", dir=folder or ".")
    except OSError:
        return False  # a read-only folder: the index is only a cache
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the index from other users of the shards
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            return False  # a full disk, or somebody removed the temporary file
        raise
    return True


def count_samples(paths: list[str], jobs: int, progress: Progress | None = None) -> list[int]:
    """Samples of each shard; as `index_heads`."""
    return [head.samples for head in index_heads(paths, jobs, progress)]


def index_heads(paths: list[str], jobs: int, progress: Progress | None = None) -> list[IndexHead]:
    """First line of each shard's index; shards without a valid index are walked by `jobs` processes.

    Raises:
        ShardError: a shard is missing, or is not one that samples can be read from.
    """
    with ThreadPoolExecutor(16) as pool:  # threads: on a network file system each file costs a round trip
        heads = list(pool.map(_head_of, paths))
    missing = [number for number, head in enumerate(heads) if head is None]
    # Ranks that start together each begin elsewhere; where one has been, the next one finds an index.
    turn = os.getpid() * 7919 % max(len(missing), 1)
    missing = missing[turn:] + missing[:turn]
    task = progress.add_task("indexing shards", total=len(missing)) if progress else None
    for number, head in zip(missing, _index_all([paths[number] for number in missing], jobs), strict=True):
        heads[number] = head
        if progress:
            progress.advance(task)
    return heads


def _head_of(path: str) -> IndexHead | None:
    with open_shard(path) as file:
        return valid_head(path, file)


def _index_all(paths: list[str], jobs: int) -> Iterator[IndexHead]:
    """First line of each shard's index, in order, as they become known."""
    if jobs < 2 or len(paths) < PARALLEL_SHARDS:
        yield from map(ensure_index, paths)
        return
    # Plain subprocesses: those of multiprocessing import the parent's main module, which may be the trainer.
    # They read shard names from their standard input, and so end when the parent does.
    script = "from megablip.data.index import helper_main; helper_main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    jobs = min(jobs, len(paths))
    helpers = [
        subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, env=environment) for _ in range(jobs)
    ]
    idle = list(helpers)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield from pool.map(partial(_ask, idle), paths)
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        for helper in helpers:
            helper.kill()
            helper.communicate()


def _ask(idle: list[subprocess.Popen], path: str) -> IndexHead:
    """Have an idle helper index a shard."""
    helper = idle.pop()
    try:
        helper.stdin.write(json.dumps(path).encode() + b"\n")
        helper.stdin.flush()
        answer = json.loads(helper.stdout.readline() or b"null")
    except BrokenPipeError:
        answer = None
    if answer is None:
        what = "a process that indexes shards was killed"
        raise MegablipError(what, where=path, remedy="if memory ran out (see dmesg), use fewer jobs")
    idle.append(helper)
    if isinstance(answer, list):
        what, where, remedy = answer
        raise ShardError(what, where=where, remedy=remedy)
    return IndexHead.parse(answer.encode())


def helper_main() -> None:
    """Entry of a process that indexes: JSON lines, a path in, out the first line or the parts of an error."""
    for line in sys.stdin:
        try:
            answer: str | list[str] = bytes(ensure_index(json.loads(line))).decode()
        except ShardError as error:
            answer = [error.what, error.where, error.remedy]
        print(json.dumps(answer), flush=True)


def ensure_index(path: str) -> IndexHead:
    """First line of the index of a shard, which has one from now on, where it can be written.

    Raises:
        ShardError: the shard can't be read, or is not one that samples can be read from.
    """
    with open_shard(path) as file:
        head = valid_head(path, file)
        if head:
            return head
        index = build_index(path, file)
        index.close()
        return index.head


# --- reading ------------------------------------------------------------------


def open_shard(path: str) -> BinaryIO:
    """
    Raises:
        ShardError: it can't be opened.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ShardError(
            f"the shard can't be opened: {error.strerror}", where=path, remedy="check the path and its permissions"
        ) from None


def load_index(path: str, file: BinaryIO) -> ShardIndex | None:
    """The index beside an open shard; None if there is none or it is not of this shard.

    Checks what `valid_head` does, the number of lines, and the last member.
    """
    if valid_head(path, file) is None:
        return None
    try:
        descriptor = os.open(index_path(path), os.O_RDONLY)
    except OSError:
        return None
    index = ShardIndex.from_file(descriptor)
    last = index and index.sample(len(index) - 1)
    if last and _has(file, last[1][-1]):
        return index
    if index:
        index.close()
    return None


def read_head(path: str) -> IndexHead | None:
    """The first line of the index beside a shard, which need not be there; None if there is none."""
    try:
        with open(index_path(path), "rb") as index:
            return IndexHead.parse(index.readline(MAX_HEAD_BYTES))
    except OSError:
        return None


def valid_head(path: str, file: BinaryIO) -> IndexHead | None:
    """The first line of the index beside an open shard; None if there is none or it is of another shard.

    Checks the size of the shard, its first member, and where its archive ends. An index without these must be as
    new as its shard and fit it to the end.
    """
    shard = os.fstat(file.fileno())
    try:
        with open(index_path(path), "rb") as index:
            head = IndexHead.parse(index.readline(MAX_HEAD_BYTES))
            first = _parse_line(index.readline(MAX_LINE_BYTES), " ")
            if head is None or first is None or not _has(file, first[1][0]):
                return None
            if head.size_bytes >= 0:
                return head if head.size_bytes == shard.st_size and _is_end(file, head.end) else None
            status = os.fstat(index.fileno())
            index.seek(-min(MAX_LINE_BYTES, status.st_size), os.SEEK_END)
            *_, line = index.read().splitlines(keepends=True)
    except OSError:
        return None
    last = _parse_line(line, " ") if line.endswith(b"\n") else None
    if last is None or status.st_mtime_ns < shard.st_mtime_ns:
        return None
    _, offset, size, _ = member = last[1][-1]
    return head if _has(file, member) and _is_end(file, padded(offset + size)) else None


def _has(file: BinaryIO, member: Member) -> bool:
    _, offset, size, name = member
    header = os.pread(file.fileno(), BLOCK_BYTES, offset - BLOCK_BYTES)
    return is_header_of(header, name, size)


def _is_end(file: BinaryIO, offset: int) -> bool:
    """Whether the archive ends at an offset: with a block of zeros, or with the file."""
    return not os.pread(file.fileno(), BLOCK_BYTES, offset).strip(b"\0")
