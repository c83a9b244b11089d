"""Data sources: lists of tar shards, local or remote, read sample by sample in any order.

A shard is a plain webdataset tar; its index says where each sample lies, so a
sample is one or two reads at known offsets, and memory stays O(1).
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from typing import BinaryIO, NamedTuple

import braceexpand
import numpy as np

from megablip.data.cache import ShardCache, glob_url, is_url
from megablip.data.index import (
    IndexHead,
    ShardIndex,
    build_index,
    index_heads,
    index_path,
    load_index,
    open_shard,
    read_head,
)
from megablip.data.tar import BLOCK_BYTES, Damage, Member, is_header_of
from megablip.errors import SampleError, ShardError

MAX_MEMBER_BYTES = 256 << 20  # a larger member is a bad sample: what is read must fit in memory
MAX_SAMPLE_BYTES = 512 << 20  # all members together
OPEN_SHARDS = 64  # local shards of a source whose files and line table stay open
OPEN_REMOTE_SHARDS = 2  # as many copies of remote ones: they take disk space even if the cache has removed them
IN_MEMORY_BYTES = 256 << 20  # of indexes that can't be files
INDEX_JOBS = 8  # processes that index shards: a node has several ranks
COPIES_AT_A_TIME = 8  # remote indexes, or shards that have none
HEAD_BYTES = 1 << 12  # of a long member, where they may be enough

_LONG_BYTES = 1 << 14  # a longer member is read apart: to cut it out would copy it once more

HeadRule = Callable[[bytes, int], bool]


def expand_shards(spec: str | list[str]) -> list[str]:
    """Shard paths and URLs named by a path, folder, URL, glob, braces, or a list of these; sorted, distinct.

    A URL without a wildcard is taken as it is: whether it exists is seen when it is read.

    Raises:
        ShardError: a named file is missing, or a glob or folder gives no shard.
    """
    patterns = [spec] if isinstance(spec, str) else spec
    return sorted({path for pattern in patterns for path in _expand(pattern)})


def _expand(pattern: str) -> Iterator[str]:
    pattern = pattern if is_url(pattern) else os.path.expanduser(pattern)
    if os.path.isfile(pattern):  # also a name that holds braces or brackets itself
        yield os.path.normpath(pattern)
        return
    try:
        paths = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise ShardError("unbalanced braces", where=pattern, remedy="write part-{000..099}.tar") from None
    for path in paths:
        yield from _expand_url(path) if is_url(path) else map(os.path.normpath, _expand_path(path))


def _expand_url(url: str) -> list[str]:
    if not url.endswith("/") and not {*"*["} & {*url}:
        return [url]
    found = glob_url(url)
    if not found:
        raise ShardError("no shard matches the URL", where=url, remedy="check data.sources.*.shards")
    return found


def _expand_path(path: str) -> list[str]:
    if glob.has_magic(path):
        found = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        return found or _refuse_folder(os.path.dirname(path) or ".", f"no shard matches '{path}'")
    if os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), "*.tar"))
        return found or _refuse_folder(path, "the folder holds no .tar shard")
    if os.path.isfile(path):
        return [path]
    raise ShardError("the shard does not exist", where=path, remedy="check data.sources.*.shards")


def _refuse_folder(folder: str, what: str) -> list[str]:
    if not os.path.isdir(folder):
        raise ShardError(f"{what}: the folder does not exist", where=folder, remedy="check data.sources.*.shards")
    held = "is empty" if not os.listdir(folder) else "holds other files only"
    raise ShardError(
        f"{what}: the folder {held}", where=folder, remedy="put shards there, or correct data.sources.*.shards"
    )


class _OpenShard(NamedTuple):
    file: BinaryIO
    index: ShardIndex

    def close(self) -> None:
        self.file.close()
        self.index.close()


class ShardSource:
    """The samples of a data source: a list of shards, read by (shard, sample).

    Only the shards used last are open, and 9 bytes are kept of each of the others.  To open a copy of a remote shard
    again takes a millisecond; where the cache has removed it, it is fetched again.

    Args:
        name: names the source in errors.
        paths: shards, paths or URLs, in the order that their numbers mean.
        cache: where copies of remote shards are kept; needed if there are any.

    Raises:
        ShardError: a shard is remote and there is no cache.
    """

    def __init__(self, name: str, paths: list[str], *, cache: ShardCache | None = None):
        self.name, self.paths = name, paths
        self._cache = cache
        self._remote = np.array([is_url(path) for path in paths], bool)
        self._counts = np.zeros(len(paths), np.int64)  # 0: not known yet
        self._headers = ""
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._in_memory: OrderedDict[int, ShardIndex] = OrderedDict()  # of shards whose index can't be a file
        if cache is None and self._remote.any():
            remote = paths[int(self._remote.argmax())]
            raise ShardError("a remote shard needs a cache", where=remote, remedy="set data.cache_dir")

    @cached_property
    def counts(self) -> np.ndarray:
        """int64[shards], samples of each; indexes the shards that have no valid index.

        Raises:
            ShardError: a shard is missing, or is not one that samples can be read from.
        """
        local, remote = np.flatnonzero(~self._remote).tolist(), np.flatnonzero(self._remote).tolist()
        jobs = min(len(os.sched_getaffinity(0)), INDEX_JOBS)
        heads = dict(zip(local, index_heads([self.paths[shard] for shard in local], jobs), strict=True))
        with ThreadPoolExecutor(COPIES_AT_A_TIME) as pool:
            heads |= zip(remote, pool.map(self._remote_head, remote), strict=True)
        in_order = [heads[shard] for shard in range(len(self.paths))]
        for shard, head in enumerate(in_order):
            self._remember(shard, head.samples)
        self._headers = _digest(f"{head.size_bytes} {head.headers}" for head in in_order)
        return self._counts

    def count(self, shard: int) -> int:
        """Samples of one shard, which alone is fetched or indexed if need be.

        Raises:
            ShardError: as `counts`.
        """
        if not self._counts[shard]:
            head = self._head_by_index(shard) if self._remote[shard] else None
            if head:
                self._remember(shard, head.samples)
            else:
                self._shard(shard)
        return int(self._counts[shard])

    @property
    def names(self) -> str:
        """Digest of the shards' base names: not of their folders, as data may move."""
        return _digest(os.path.basename(path) for path in self.paths)

    @property
    def headers(self) -> str:
        """Digest of the shards' sizes and headers, as their indexes have them.

        Raises:
            ShardError: as `counts`.
        """
        _ = self.counts  # they come by the same reads
        return self._headers

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def read(self, shard: int, sample: int, is_enough: HeadRule | None = None) -> tuple[str, dict[str, bytes]]:
        """(key, {extension: bytes}) of a sample.

        Args:
            is_enough: told the first HEAD_BYTES of a long member and its size, says whether the rest is not needed.

        Raises:
            SampleError: a member, or all together, are too large.
            ShardError: the shard is not what its index says.
        """
        opened = self._shard(shard)
        key, members = self._sample(shard, sample, opened)
        try:
            return key, self._read(shard, members, opened.file.fileno(), is_enough)
        except OSError as error:
            raise ShardError(
                f"the shard can't be read: {error.strerror}",
                where=f"{self.paths[shard]}, offset {members[0][1]}",
                remedy="check its file system and start again: the run goes on from its last checkpoint",
            ) from None

    def where(self, shard: int, sample: int) -> tuple[str, str, int]:
        """(shard path, key, offset of its first member in bytes) of a sample, for messages."""
        key, members = self._sample(shard, sample, self._shard(shard))
        return self.paths[shard], key, members[0][1]

    def damage(self, shard: int) -> list[Damage]:
        """Damaged ranges of a shard; samples that they touch are not counted.

        Raises:
            ShardError: as `counts`.
        """
        return list(self._shard(shard).index.head.damage)

    def close(self) -> None:
        """Close all shards; what is asked for afterwards is opened again."""
        while self._open:
            self._close_oldest()

    def _read(self, shard: int, members: list[Member], descriptor: int, is_enough: HeadRule | None) -> dict[str, bytes]:
        """Members of a sample, in as few reads as need no second copy of long members.

        One header is looked at, too: it shows whether the shard is still the one that was indexed.
        """
        total = sum(size for _, _, size, _ in members)
        if total > MAX_SAMPLE_BYTES:
            raise SampleError(
                f"the sample has {total} bytes, above the limit of {MAX_SAMPLE_BYTES}",
                where=f"{self.paths[shard]}, offset {members[0][1]}",
            )
        contents: dict[str, bytes] = {}
        _, last, size, _ = members[-1]
        end = last + size
        data, start, checked = b"", 0, False
        for extension, offset, size, name in members:
            if size > MAX_MEMBER_BYTES:
                raise SampleError(
                    f"member '{name}' has {size} bytes, above the limit of {MAX_MEMBER_BYTES}",
                    where=f"{self.paths[shard]}, offset {offset}",
                )
            if size > _LONG_BYTES:
                if is_enough:
                    head = os.pread(descriptor, HEAD_BYTES, offset)
                    if len(head) == HEAD_BYTES and is_enough(head, size):
                        contents[extension] = head
                        continue
                content = os.pread(descriptor, size, offset)
            else:
                at = offset - start
                if not BLOCK_BYTES <= at <= len(data) - size:
                    start, at = offset - BLOCK_BYTES, BLOCK_BYTES
                    data = os.pread(descriptor, min(end - start, BLOCK_BYTES + 2 * _LONG_BYTES), start)
                if not checked:
                    self._check(shard, data[at - BLOCK_BYTES : at], name, offset, size)
                    checked = True
                content = data[at : at + size]
            if len(content) != size:
                raise self._changed(shard, f"'{name}' at offset {offset} ends early")
            contents[extension] = content
        if not checked:
            _, offset, size, name = members[0]
            self._check(shard, os.pread(descriptor, BLOCK_BYTES, offset - BLOCK_BYTES), name, offset, size)
        return contents

    def _check(self, shard: int, header: bytes, name: str, offset: int, size: int) -> None:
        if not is_header_of(header, name, size):
            raise self._changed(shard, f"'{name}' is not at offset {offset}")

    def _sample(self, shard: int, sample: int, opened: _OpenShard) -> tuple[str, list[Member]]:
        if not 0 <= sample < len(opened.index):
            raise self._changed(shard, f"it has {len(opened.index)} samples, and sample {sample} was asked for")
        found = opened.index.sample(sample)
        if found is None:
            raise self._changed(shard, f"line {sample + 2} of its index is not one webdataset sample")
        return found

    def _changed(self, shard: int, what: str) -> ShardError:
        index = index_path(self._local_path(shard))
        return ShardError(
            f"the shard and its index disagree: {what}",
            where=f"source {self.name}, {self.paths[shard]}",
            remedy=f"if the shard was changed, delete {index}; it is made again",
        )

    def _remember(self, shard: int, count: int) -> None:
        if self._counts[shard] not in (0, count):
            raise self._changed(shard, f"it had {self._counts[shard]} samples when it was first used, now {count}")
        self._counts[shard] = count

    def _local_path(self, shard: int) -> str:
        return self._cache.path(self.paths[shard]) if self._remote[shard] else self.paths[shard]

    def _remote_head(self, shard: int) -> IndexHead:
        """Of a remote shard; it is fetched if its index is not enough."""
        head = self._head_by_index(shard)
        if head is None:
            opened = self._open_one(shard)
            opened.close()
            head = opened.index.head
        return head

    def _head_by_index(self, shard: int) -> IndexHead | None:
        """Of a remote shard, by the index beside it; None if there is none.

        Nor is one by DALI enough: it does not say of how large a shard it is, so the shard is fetched to be counted.
        """
        url = self.paths[shard]
        self._cache.fetch_index(url)
        head = read_head(self._cache.path(url))
        return head if head and head.size_bytes == self._cache.size(url) else None

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened:
            self._open.move_to_end(shard)
            return opened
        alike = [other for other in self._open if self._remote[other] == self._remote[shard]]
        while len(alike) >= (OPEN_REMOTE_SHARDS if self._remote[shard] else OPEN_SHARDS):
            self._open.pop(alike.pop(0)).close()
        opened = self._open_one(shard)
        try:
            self._remember(shard, len(opened.index))
        except ShardError:
            opened.close()
            raise
        self._open[shard] = opened
        if opened.index.unsaved_bytes:
            self._in_memory[shard] = opened.index
            while len(self._in_memory) > 1 and sum(i.unsaved_bytes for i in self._in_memory.values()) > IN_MEMORY_BYTES:
                self._in_memory.popitem(last=False)
        return opened

    def _open_one(self, shard: int) -> _OpenShard:
        path = self._local_path(shard)
        file = self._cache.open(self.paths[shard]) if self._remote[shard] else open_shard(path)
        try:
            index = self._in_memory.get(shard) or load_index(path, file)
            if index is None:
                with self._cache.lock(self.paths[shard]) if self._remote[shard] else nullcontext():
                    index = load_index(path, file) or build_index(path, file)
            return _OpenShard(file, index)
        except ShardError as error:
            file.close()
            if not self._remote[shard]:
                raise
            where = f"{self.paths[shard]}, copied to {error.where}"
            raise ShardError(error.what, where=where, remedy=error.remedy) from None

    def _close_oldest(self) -> None:
        _, opened = self._open.popitem(last=False)
        opened.close()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
