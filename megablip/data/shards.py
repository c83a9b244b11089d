"""Tar shards: where each sample lies, and reading it by its offset.

A shard is a plain webdataset tar.  One walk over its headers makes an index in
the text format of NVIDIA DALI's `wds2idx` (v1.2), kept beside the shard:

    v1.2 <number of samples>
    <extension> <offset> <size> <member name> [<extension> ...]     one line a sample

Offsets and sizes are bytes from the start of the tar.  A sample is then read
with a `pread` per member, in any order, at O(1) memory.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import BinaryIO

import braceexpand
import numpy as np

from megablip.errors import SampleError, ShardError

INDEX_VERSION = b"v1.2"
BLOCK_BYTES = tarfile.BLOCKSIZE  # a tar is made of blocks of 512 bytes
MAX_MEMBER_BYTES = 256 << 20  # a larger member is a bad sample: what is read must fit in memory
OPEN_SHARDS = 64  # shards whose files and line table stay open

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Member = tuple[str, int, int]  # name, offset in the tar, size in bytes


def expand_shards(spec: str | list[str]) -> list[str]:
    """Shard paths named by a path, folder, glob, braces, or a list of these; sorted, distinct.

    Raises:
        ShardError: a named file is missing, or a glob or folder gives no shard.
    """
    patterns = [spec] if isinstance(spec, str) else spec
    return sorted({os.path.normpath(path) for pattern in patterns for path in _expand(os.path.expanduser(pattern))})


def _expand(pattern: str) -> Iterator[str]:
    if os.path.isfile(pattern):  # also a name that holds braces or brackets itself
        yield pattern
        return
    try:
        paths = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise ShardError("unbalanced braces", where=pattern, remedy="write part-{000..099}.tar") from None
    for path in paths:
        if glob.has_magic(path):
            found = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
            if not found:
                _refuse_folder(os.path.dirname(path) or ".", f"no shard matches '{path}'")
            yield from found
        elif os.path.isdir(path):
            found = glob.glob(os.path.join(glob.escape(path), "*.tar"))
            if not found:
                _refuse_folder(path, "the folder holds no .tar shard")
            yield from found
        elif os.path.isfile(path):
            yield path
        else:
            raise ShardError("the shard does not exist", where=path, remedy="check data.sources.*.shards")


def _refuse_folder(folder: str, what: str) -> None:
    if not os.path.isdir(folder):
        raise ShardError(f"{what}: the folder does not exist", where=folder, remedy="check data.sources.*.shards")
    held = "is empty" if not os.listdir(folder) else "holds other files only"
    raise ShardError(
        f"{what}: the folder {held}", where=folder, remedy="put shards there, or correct data.sources.*.shards"
    )


def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, extension in lower case) of a tar member, or None for one that is no part of a sample.

    This is webdataset's rule (webdataset.tariterators: base_plus_ext, tar_file_iterator, group_by_keys):
    the key is the path up to the first dot of the base name; `__name__` members are metadata.
    """
    if re.match(r"__[^/]*__($|/)", name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
        return None
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2].lower()) if match else None


# --- indexing -----------------------------------------------------------------


def walk_members(path: str, file: BinaryIO, start: int = 0) -> Iterator[Member]:
    """Members that belong to samples, in order, from the header at offset `start` to the end of the archive.

    Directories, links and metadata are passed over, as webdataset does.

    Raises:
        ShardError: not a plain tar, damaged or truncated, with the offset.
    """
    file.seek(start)
    offset = start
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members.clear()
            if member.size < 0 or tar.offset <= offset:
                raise tarfile.ReadError("a member of negative size")
            if member.issparse():
                raise ShardError(
                    f"'{member.name}' is a sparse member", where=path, remedy="write the tar without --sparse"
                )
            offset = tar.offset
            if member.isreg() and split_name(member.name):
                yield member.name, member.offset_data, member.size
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise _damaged(path, file, offset, str(error)) from None
    # tarfile takes a broken or missing header for the end; the end is a block of zeros.
    file.seek(offset)
    if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise _damaged(path, file, offset, "no valid header and no end-of-archive block")


def _damaged(path: str, file: BinaryIO, offset: int, reason: str) -> ShardError:
    file.seek(0)
    head = file.read(BLOCK_BYTES)
    size = os.fstat(file.fileno()).st_size
    where = f"{path}, offset {offset} of {size} bytes"
    if not size:
        return ShardError("the shard has zero bytes", where=path, remedy="copy or write it again, or remove it")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return ShardError(
                f"the shard is compressed ({name}), so samples can't be read by offset",
                where=path,
                remedy="decompress it; images gain nothing from compression",
            )
    if offset == 0:
        return ShardError(f"the file is not a tar: {reason}", where=where, remedy="check data.sources.*.shards")
    return ShardError(
        f"the shard is truncated or damaged: {reason}", where=where, remedy="copy or write it again, or remove it"
    )


def group_samples(path: str, members: Iterable[Member]) -> list[list[Member]]:
    """Adjacent members of one key, as one sample each.

    Raises:
        ShardError: two members of one name; a key that comes back after another; no sample at all.
    """
    samples: list[list[Member]] = []
    seen: set[str] = set()
    for key, group in itertools.groupby(members, key=lambda member: split_name(member[0])[0]):
        sample = list(group)
        offset = sample[0][1]
        if key in seen:
            raise ShardError(
                f"duplicate key '{key}': its members are not adjacent, or two samples share it",
                where=f"{path}, offset {offset}",
                remedy="write the tar with --sort=name and one key for each sample",
            )
        seen.add(key)
        if len({split_name(name)[1] for name, _, _ in sample}) < len(sample):
            raise ShardError(
                f"key '{key}' has two members of one extension",
                where=f"{path}, offset {offset}",
                remedy="give each sample its own key",
            )
        samples.append(sample)
    if not samples:
        raise ShardError("the shard holds no sample", where=path, remedy="remove it, or check how it was written")
    return samples


class ShardIndex:
    """Lines of an index: in a file beside the shard, or in memory where none can be written.

    Holds 8 bytes a sample; a line is read when its sample is asked for.
    """

    def __init__(self, ends: np.ndarray, source: int | bytes, separator: bytes):
        self._ends = ends  # int64[samples + 1], where each line ends; [0] ends the header
        self._source = source  # file descriptor, or the text itself
        self._separator = separator

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self._source, bytes)

    @classmethod
    def in_memory(cls, samples: list[list[Member]]) -> ShardIndex:
        # Zeros part the fields: a name that a text line can't hold may have spaces and line ends.
        lines = [_line(sample, "\0") for sample in samples]
        return cls(np.cumsum([0, *map(len, lines)]), b"".join(lines), b"\0")

    @classmethod
    def from_file(cls, descriptor: int) -> ShardIndex | None:
        """None if the number of lines is not what the first line says."""
        text = np.frombuffer(os.pread(descriptor, os.fstat(descriptor).st_size, 0), np.uint8)
        ends = np.flatnonzero(text == ord("\n")) + 1
        count = _count_of(text[:64].tobytes())
        return cls(ends, descriptor, b" ") if count is not None and len(ends) == count + 1 else None

    def members(self, sample: int) -> list[Member]:
        """Members of a sample; empty if the line is not of the format."""
        start, end = int(self._ends[sample]), int(self._ends[sample + 1])
        line = self._source[start:end] if self.is_in_memory else os.pread(self._source, end - start, start)
        return _parse_line(line, self._separator)

    def close(self) -> None:
        if not self.is_in_memory:
            os.close(self._source)


def _line(sample: list[Member], separator: str) -> bytes:
    fields = [field for name, offset, size in sample for field in (split_name(name)[1], str(offset), str(size), name)]
    return separator.join(fields).encode("utf-8", "surrogateescape") + b"\n"


def _parse_line(line: bytes, separator: bytes) -> list[Member]:
    fields = line[:-1].split(separator)
    if len(fields) % 4 or not line.endswith(b"\n"):
        return []
    try:
        return [
            (name.decode("utf-8", "surrogateescape"), int(offset), int(size))
            for offset, size, name in zip(fields[1::4], fields[2::4], fields[3::4], strict=True)
        ]
    except ValueError:
        return []


def _count_of(head: bytes) -> int | None:
    match = re.match(rb"v1\.2 (\d{1,12})\n", head)
    return int(match[1]) if match else None


def index_path(path: str) -> str:
    """Where the index of a shard lies: `part-000.tar` has `part-000.idx`."""
    return path.removesuffix(".tar") + ".idx"


def build_index(path: str) -> ShardIndex:
    """Walk a shard and write its index beside it; in memory where the folder or a name does not allow it.

    Raises:
        ShardError: the shard can't be read, is damaged, or breaks webdataset's rules.
    """
    with _open_shard(path) as file:
        samples = group_samples(path, walk_members(path, file))
    target = index_path(path)
    writable = all(
        split_name(name)[1] and not re.search(r"\s", name) for sample in samples for name, _, _ in sample
    ) and _is_ours(target)
    if writable:
        text = b"%s %d\n" % (INDEX_VERSION, len(samples)) + b"".join(_line(sample, " ") for sample in samples)
        try:
            _write_atomically(target, text)
        except OSError:
            writable = False  # a read-only folder or a full disk: the index is only a cache
    return (writable and load_index(path)) or ShardIndex.in_memory(samples)


def _is_ours(path: str) -> bool:
    """Whether an index may be written here: other formats use the same extension."""
    try:
        with open(path, "rb") as file:
            return file.read(2) in (b"v1", b"")
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _write_atomically(path: str, text: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".idx.tmp", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the index from other users of the shards
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_index(path: str) -> ShardIndex | None:
    """The index beside a shard; None if there is none or it is not of this shard."""
    if read_count(path) is None:
        return None
    descriptor = os.open(index_path(path), os.O_RDONLY)
    index = ShardIndex.from_file(descriptor)
    if index is None:
        os.close(descriptor)
    return index


def read_count(path: str) -> int | None:
    """Number of samples by the index beside a shard, from its first and last line alone.

    None unless the index is as new as the shard, its last member has that size in
    the shard, and no further sample lies between it and the end of the archive.

    Raises:
        ShardError: the shard itself can't be opened.
    """
    with _open_shard(path) as file:
        try:
            with open(index_path(path), "rb") as index:
                if os.fstat(index.fileno()).st_mtime_ns < os.fstat(file.fileno()).st_mtime_ns:
                    return None
                count = _count_of(index.read(64))
                index.seek(-min(1 << 16, os.fstat(index.fileno()).st_size), os.SEEK_END)
                *_, last = [b"", *index.read().splitlines(keepends=True)]
        except OSError:
            return None
        members = _parse_line(last, b" ")
        return count if count and members and _ends_with(path, file, members[-1]) else None


def _ends_with(path: str, file: BinaryIO, last: Member) -> bool:
    _, offset, size = last
    if offset < BLOCK_BYTES or size < 0 or offset % BLOCK_BYTES:
        return False
    file.seek(offset - BLOCK_BYTES)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK_BYTES), "utf-8", "surrogateescape")
        padded = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        return header.size == size and next(walk_members(path, file, offset + padded), None) is None
    except (tarfile.TarError, ShardError):
        return False


def _open_shard(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ShardError(
            f"the shard can't be opened: {error.strerror}", where=path, remedy="check the path and its permissions"
        ) from None


# --- reading ------------------------------------------------------------------


class ShardSource:
    """The samples of a data source: a list of shards, read by (shard, sample).

    Args:
        name: names the source in errors.
        paths: shards, in the order that their numbers mean.
    """

    def __init__(self, name: str, paths: list[str]):
        self.name, self.paths = name, paths
        self._in_memory: dict[int, ShardIndex] = {}  # of shards whose index can't be a file
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()

    @cached_property
    def counts(self) -> np.ndarray:
        """int64[shards], samples of each; indexes the shards that have no valid index.

        Raises:
            ShardError: a shard is missing, damaged or empty.
        """
        return np.array([read_count(path) or len(self._shard(shard)[1]) for shard, path in enumerate(self.paths)])

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def read(self, shard: int, sample: int) -> tuple[str, dict[str, bytes]]:
        """(key, {extension: bytes}) of a sample.

        Raises:
            SampleError: a member is too large.
            ShardError: the shard is not what its index says.
        """
        members = self._members(shard, sample)
        file, _ = self._shard(shard)
        contents = {}
        for name, offset, size in members:
            if size > MAX_MEMBER_BYTES:
                raise SampleError(
                    f"member '{name}' has {size} bytes, above the limit of {MAX_MEMBER_BYTES}",
                    where=f"{self.paths[shard]}, offset {offset}",
                )
            try:
                data = os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise ShardError(
                    f"the shard can't be read: {error.strerror}",
                    where=f"{self.paths[shard]}, offset {offset}",
                    remedy="check its file system and start again: the run goes on from its last checkpoint",
                ) from None
            if len(data) != size:
                raise self._changed(shard, f"'{name}' at offset {offset} ends early")
            contents[split_name(name)[1]] = data
        return split_name(members[0][0])[0], contents

    def where(self, shard: int, sample: int) -> tuple[str, str, int]:
        """(shard path, key, offset of its first member in bytes) of a sample, for messages."""
        name, offset, _ = self._members(shard, sample)[0]
        return self.paths[shard], split_name(name)[0], offset

    def close(self) -> None:
        while self._open:
            self._close_oldest()

    def _members(self, shard: int, sample: int) -> list[Member]:
        _, index = self._shard(shard)
        if not 0 <= sample < len(index):
            raise self._changed(shard, f"it has {len(index)} samples, and sample {sample} was asked for")
        members = index.members(sample)
        names = [split_name(name) for name, _, _ in members]
        inside = all(0 <= offset < 1 << 62 and size >= 0 for _, offset, size in members)
        if not names or None in names or len({key for key, _ in names}) > 1 or not inside:
            raise self._changed(shard, f"line {sample + 2} of its index is not one webdataset sample")
        return members

    def _changed(self, shard: int, what: str) -> ShardError:
        return ShardError(
            f"the shard and its index disagree: {what}",
            where=f"source {self.name}, {self.paths[shard]}",
            remedy=f"if the shard was changed, delete {index_path(self.paths[shard])}; it is made again",
        )

    def _shard(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.paths[shard]
        index = self._in_memory.get(shard) or load_index(path) or build_index(path)
        if index.is_in_memory:
            self._in_memory[shard] = index
        self._open[shard] = (_open_shard(path), index)
        if len(self._open) > OPEN_SHARDS:
            self._close_oldest()
        return self._open[shard]

    def _close_oldest(self) -> None:
        _, (file, index) = self._open.popitem(last=False)
        file.close()
        index.close()
