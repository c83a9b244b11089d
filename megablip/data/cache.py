"""Remote shards: named by URLs that fsspec knows, read from copies on this node.

The processes of a node, of all its ranks, share one folder of copies.  A copy is
made by one of them while the others wait for its lock, under a temporary name, and
appears when it is whole.  Together the copies take a bounded number of bytes: the
one that was used longest ago goes first.  Who has it open keeps it, as Linux does
with files that lose their name.
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
        folder: made if it is not there; for copies alone.
        limit_bytes: what the copies may take together. Should hold several shards of each rank.
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
        with self._lock(path):
            with suppress(FileNotFoundError):
                if os.stat(path).st_size == size:
                    os.utime(path)  # used now
                    return open(path, "rb", buffering=0)
                _remove(path)  # the remote shard changed since
                _remove(index_path(path))
            return self._download(url, path, size)

    def fetch_index(self, url: str) -> None:
        """Copy the index that lies beside a remote shard, if there is one."""
        path = self.path(url)
        remote, local = index_path(url), index_path(path)
        with self._lock(path):
            if os.path.exists(local):
                os.utime(local)
                return
            filesystem, name = _filesystem(remote)
            with suppress(FileNotFoundError):  # then it is made from the shard
                size = _retried(remote, lambda: filesystem.info(name)["size"])
                if size is not None and size <= self.size(url):
                    self._download(remote, local, size).close()

    # --- files ----------------------------------------------------------------

    def _lock(self, path: str) -> AbstractContextManager:
        """Hold the lock of a copy while in the context."""

        def acquire() -> AbstractContextManager:
            self._folder.mkdir(parents=True, exist_ok=True)
            return FileLock(path + ".lock").acquire()

        return self._guarded(path, acquire)

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

    def _reserve(self, url: str, part: str, size: int) -> None:
        """Make a file of the size of the one to come, and room for it: others being copied are waited for."""
        if size > self._limit:
            raise ShardError(
                f"the shard has {size} bytes, more than the cache of {self._limit} bytes holds",
                where=f"{url}, cache {self._folder}",
                remedy="raise data.cache_bytes",
            )
        while True:
            with FileLock(self._folder / "evict.lock"):
                if self._evict(self._limit - size):
                    self._guarded(url, lambda: _make_sized(part, size))
                    return
            time.sleep(WAIT_S)

    def _evict(self, limit_bytes: int) -> bool:
        """Remove copies, the least recently used first, until the rest takes `limit_bytes` at most; if it does so."""
        files = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if not entry.name.endswith(".lock"):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > limit_bytes and (not path.endswith(".part") or self._is_abandoned(path)):
                _remove(path)
                total -= size
        return total <= limit_bytes

    def _is_abandoned(self, part: str) -> bool:
        """Whether who was making a copy is gone, and its lock with it."""
        lock = FileLock(part.removesuffix(".part") + ".lock")
        try:
            with lock.acquire(timeout=0):
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


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _make_sized(path: str, size: int) -> None:
    """A file that takes `size` bytes from now on, so that a full disk is noticed before the copy begins."""
    with open(path, "wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
