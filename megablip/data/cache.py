"""Remote shards: named by URLs that fsspec knows, read from copies on this node.

The processes of a node, of all its ranks, share one folder of copies.  A copy is
made by one of them while the others wait for its lock, under a temporary name, and
appears when it is whole.  Together the copies take a bounded number of bytes: the
one that was used longest ago goes first.  Who has it open keeps it, and its bytes
on the disk, as Linux does with files that lose their name.

All files of a shard begin with the same 24 hexadecimal digits, and so does its lock:
who makes one of them holds it.  Other files in the folder are nobody's business.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from filelock import FileLock, Timeout

from megablip.data.index import index_path, open_shard
from megablip.errors import ShardError

ATTEMPTS = 4  # of a request to a remote store
RETRY_S = 1.0  # before the second attempt; twice as long before each further one
WAIT_S = 0.2  # until a cache that is full of unfinished copies is looked at again
CHUNK_BYTES = 8 << 20  # copied at a time

_OURS = re.compile(r"\.?([0-9a-f]{24})-.*", re.DOTALL)  # names of copies, indexes, and those being made
_UNFINISHED = (".part", ".idx.tmp")  # the latter is an index that is being written
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs"}
_DONT_RETRY = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")


def is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def glob_url(pattern: str) -> list[str]:
    """URLs that match a pattern, or of the .tar files of a folder.

    Raises:
        ShardError: the store can't be reached.
    """
    filesystem, path = _filesystem(pattern)

    def find() -> list[str]:
        if filesystem.isdir(path):
            return filesystem.glob(path.rstrip("/") + "/*.tar")
        return filesystem.glob(path)

    return sorted(filesystem.unstrip_protocol(name) for name in _retried(pattern, find))


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    protocol = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise ShardError(
            f"reading {protocol}:// needs a package: {error}", where=url, remedy=f"install {package}"
        ) from None
    except ValueError as error:
        raise ShardError(f"the URL can't be read: {error}", where=url, remedy="check data.sources.*.shards") from None


def _retried(url: str, request: Callable[[], T]) -> T:
    """Result of a request, made again where it fails.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: it failed each time.
    """
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except FileNotFoundError:
            raise
        except ShardError:
            raise
        except Exception as error:  # each store has exceptions of its own
            if isinstance(error, _DONT_RETRY) or attempt == ATTEMPTS - 1:
                raise ShardError(
                    f"the remote shard can't be read: {type(error).__name__}: {error}",
                    where=url,
                    remedy="check the address, the credentials and the network",
                ) from None
            time.sleep(RETRY_S * 2**attempt)
    raise AssertionError("not reached")


class ShardCache:
    """Copies of remote shards and of their indexes, in a folder of this node.

    Args:
        folder: made if it is not there; files of others in it are neither counted nor touched.
        limit_bytes: what copies and indexes may take together. An index that is made here, a thousandth of its shard
            or so, is counted from the next copy on. A copy that was removed while somebody had it open takes its
            bytes until it is closed.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        self._folder, self._limit = Path(folder), limit_bytes
        self._sizes: dict[str, int] = {}  # of remote files, asked for once

    def path(self, url: str) -> str:
        """Where the copy of a shard lies, if there is one; the shard's index lies beside it."""
        name = url.rstrip("/").rsplit("/", 1)[-1].split("?")[0][-80:]
        return str(self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}-{name}")

    def size(self, url: str) -> int:
        """Size in bytes of a remote shard.

        Raises:
            ShardError: it does not exist, or can't be read.
        """
        if url not in self._sizes:
            filesystem, path = _filesystem(url)
            try:
                size = _retried(url, lambda: filesystem.info(path)["size"])
            except FileNotFoundError:
                remedy = "check data.sources.*.shards"
                raise ShardError("the shard does not exist", where=url, remedy=remedy) from None
            if size is None:
                remedy = "serve it with a Content-Length, or copy it here"
                raise ShardError("the server does not say how large the shard is", where=url, remedy=remedy)
            self._sizes[url] = size
        return self._sizes[url]

    def open(self, url: str) -> BinaryIO:
        """The copy of a shard, which is made if it is not there.

        Raises:
            ShardError: the shard does not exist, can't be copied, or is larger than the cache.
        """
        size, path = self.size(url), self.path(url)
        with self.lock(url):
            return self._guarded(url, lambda: _open_copy(path, size)) or self._download(url, path, size)

    def fetch_index(self, url: str) -> None:
        """Copy the index that lies beside a remote shard, if there is one."""
        remote, local = index_path(url), index_path(self.path(url))
        with self.lock(url):
            if self._guarded(url, lambda: _touch(local)):
                return
            filesystem, name = _filesystem(remote)

            def size_of() -> int | None:
                # S3 says "forbidden" of what is not there to who may not list. The index is then made from the shard.
                with suppress(FileNotFoundError, PermissionError):
                    return filesystem.info(name)["size"]
                return None

            size = _retried(remote, size_of)
            if size is not None and size <= self.size(url):
                self._download(remote, local, size).close()

    def lock(self, url: str) -> AbstractContextManager:
        """To be held while a file of a shard is made: without it, what is unfinished is taken for abandoned."""

        def acquire() -> AbstractContextManager:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._lock_of(os.path.basename(self.path(url))).acquire()

        return self._guarded(url, acquire)

    # --- files ----------------------------------------------------------------

    def _lock_of(self, name: str) -> FileLock:
        return FileLock(self._folder / f"{_OURS.fullmatch(name)[1]}.lock")

    def _download(self, url: str, path: str, size: int) -> BinaryIO:
        """Copy a remote file and open the copy, before another process can remove it; the caller holds the lock."""
        filesystem, name = _filesystem(url)
        part = path + ".part"

        def copy() -> None:
            with filesystem.open(name, "rb") as source, open(part, "r+b") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
                copied = target.tell()
            if copied != size or os.stat(part).st_size != size:
                raise OSError(f"{copied} bytes came of {size}")

        self._guarded(url, lambda: self._remove_unfinished(os.path.basename(path)))
        self._reserve(url, part, size)
        try:
            _retried(url, copy)
            copied = open_shard(part)
            os.replace(part, path)
            return copied
        except FileNotFoundError:
            raise ShardError("the shard is gone", where=url, remedy="check data.sources.*.shards") from None
        finally:
            _remove(part)

    def _remove_unfinished(self, name: str) -> None:
        """Remove what a killed process left of a shard. The caller has its lock, so `_evict` would wait for it."""
        for entry in os.scandir(self._folder):
            match = _OURS.fullmatch(entry.name)
            if match and match[1] == _OURS.fullmatch(name)[1] and entry.name.endswith(_UNFINISHED):
                _remove(entry.path)

    def _reserve(self, url: str, part: str, size: int) -> None:
        """Make a file of the size of the one to come, and room for it: others being copied are waited for."""
        if size > self._limit:
            raise ShardError(
                f"the shard has {size} bytes, more than the cache of {self._limit} bytes holds",
                where=f"{url}, cache {self._folder}",
                remedy="raise data.cache_bytes",
            )
        while True:
            if self._guarded(url, lambda: self._make_room(part, size)):
                return
            time.sleep(WAIT_S)

    def _make_room(self, part: str, size: int) -> bool:
        """Reserve `size` bytes, if what is being copied leaves so many."""
        with FileLock(self._folder / "megablip-evict.lock"):
            is_room = self._evict(self._limit - size)
            if is_room:
                _make_sized(part, size)
            return is_room

    def _evict(self, limit_bytes: int) -> bool:
        """Remove copies, the least recently used first, until the rest takes `limit_bytes` at most; if it does so."""
        files = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.name))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total > limit_bytes and (not name.endswith(_UNFINISHED) or self._is_abandoned(name)):
                _remove(str(self._folder / name))
                total -= size
        return total <= limit_bytes

    def _is_abandoned(self, name: str) -> bool:
        """Whether who was making a file is gone, and its lock with it."""
        try:
            with self._lock_of(name).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def _guarded(self, where: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise ShardError(
                f"the cache of shards can't be written: {error.strerror}",
                where=f"{where}, cache {self._folder}",
                remedy="set data.cache_dir to a folder of this node with room for data.cache_bytes",
            ) from None


def _open_copy(path: str, size: int) -> BinaryIO | None:
    """The copy, used now; None if there is none of this size."""
    with suppress(FileNotFoundError):
        if os.stat(path).st_size == size:
            os.utime(path)
            return open(path, "rb", buffering=0)
        _remove(path)  # the remote shard changed since
        _remove(index_path(path))
    return None


def _touch(path: str) -> bool:
    """Note that a file is used now; False if there is none."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _make_sized(path: str, size: int) -> None:
    """A file that takes `size` bytes from now on, so that a full disk is noticed before the copy begins."""
    with open(path, "wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
