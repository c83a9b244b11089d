import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from megablip.data import cache as cache_module
from megablip.data.cache import ShardCache, glob_url, is_url
from megablip.data.index import index_path
from megablip.data.shards import ShardSource
from megablip.errors import ShardError
from tests.data.builders import write_tar

SIZE = 4000


@pytest.fixture
def store():
    """Ten remote files of SIZE bytes, each of one letter."""
    memory = fsspec.filesystem("memory")
    for letter in "abcdefghij":
        memory.pipe(f"/store/{letter}.tar", letter.encode() * SIZE)
    yield memory
    memory.rm("/store", recursive=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "RETRY_S", 0.001)
    return ShardCache(tmp_path / "cache", 3 * SIZE)


def url(letter):
    return f"memory://store/{letter}.tar"


def read(cache, letter):
    with cache.open(url(letter)) as file:
        return file.read()


def copies(cache):
    """{letter: bytes} of what lies in the folder, locks left out."""
    files = [path for path in cache._folder.iterdir() if not path.name.endswith(".lock")]
    sizes = {}
    for path in files:
        with suppress(FileNotFoundError):  # a copy that is whole meanwhile has lost its temporary name
            sizes[path.name.split("-")[1]] = path.stat().st_size
    return sizes


def test_a_copy_is_made_once(cache, store, monkeypatch):
    assert read(cache, "a") == b"a" * SIZE
    monkeypatch.setattr(type(store), "open", lambda *_: pytest.fail("copied again"))
    assert read(cache, "a") == b"a" * SIZE
    assert copies(cache) == {"a.tar": SIZE}


def test_the_least_recently_used_goes_first(cache, store):
    for letter in "abc":
        read(cache, letter)
        time.sleep(0.01)
    read(cache, "a")
    read(cache, "d")
    assert sorted(copies(cache)) == ["a.tar", "c.tar", "d.tar"]
    assert sum(copies(cache).values()) <= 3 * SIZE


def test_an_open_copy_can_be_read_after_it_was_removed(cache, store):
    with cache.open(url("a")) as file:
        for letter in "bcde":
            read(cache, letter)
        assert "a.tar" not in copies(cache)
        assert file.read() == b"a" * SIZE


def test_indexes_come_along_and_are_not_needed(cache, store):
    store.pipe("/store/a.idx", b"v1.2 7\n")
    cache.fetch_index(url("a"))
    cache.fetch_index(url("b"))
    assert copies(cache) == {"a.idx": 7}
    assert cache.path(url("a")).endswith("-a.tar")


def test_an_index_that_is_forbidden_is_not_needed(cache, store, monkeypatch):
    """S3 says so of a missing one to who may not list."""
    whole, asked = type(store).info, []

    def forbid(self, path, **kwargs):
        asked.append(path)
        if path.endswith(".idx"):
            raise PermissionError("Forbidden")
        return whole(self, path, **kwargs)

    monkeypatch.setattr(type(store), "info", forbid)
    cache.fetch_index(url("a"))
    assert len(asked) == 1
    assert copies(cache) == {}


def test_a_source_of_remote_shards_knows_their_sizes_and_headers(tmp_path, store):
    """By their indexes or, where these are missing, by the shards themselves."""
    local = [str(write_tar(tmp_path / f"{n}.tar", [{"txt": b"x" * n}])) for n in (1, 2)]
    expected = ShardSource("test", local).headers
    urls = []
    for path in local:
        urls.append(f"memory://store/{Path(path).name}")
        store.put(path, urls[-1])
    caches = (ShardCache(tmp_path / name, 1 << 20) for name in ("fetched", "by_index", "changed"))
    assert ShardSource("test", urls, cache=next(caches)).headers == expected
    for path, url in zip(local, urls, strict=True):
        store.put(index_path(path), index_path(url))
    assert ShardSource("test", urls, cache=next(caches)).headers == expected
    store.put(str(write_tar(tmp_path / "other.tar", [{"__key__": b"other", "txt": b"y"}])), urls[0])
    store.rm(index_path(urls[0]))
    assert ShardSource("test", urls, cache=next(caches)).headers != expected


def test_an_index_larger_than_its_shard_is_not_copied(cache, store):
    store.pipe("/store/a.idx", b"v" * (SIZE + 1))
    cache.fetch_index(url("a"))
    assert copies(cache) == {}


def test_a_changed_remote_shard_is_copied_again(cache, store):
    """And its index goes with it."""
    store.pipe("/store/a.idx", b"v1.2 7\n")
    cache.fetch_index(url("a"))
    read(cache, "a")
    store.pipe("/store/a.tar", b"new" * 1000)
    later = ShardCache(cache._folder, 3 * SIZE)  # as the next run has
    assert read(later, "a") == b"new" * 1000
    assert copies(cache) == {"a.tar": 3000}


def test_a_remote_shard_that_changes_in_a_run_is_named(cache, store):
    assert cache.size(url("a")) == SIZE
    store.pipe("/store/a.tar", b"new" * 1000)
    with pytest.raises(ShardError, match="3000 bytes came of 4000") as caught:
        cache.open(url("a"))
    assert caught.value.where == url("a")
    assert copies(cache) == {}


@pytest.mark.parametrize("failures", [3, 4])
def test_a_copy_that_fails_is_made_again_a_few_times(cache, store, monkeypatch, failures):
    whole, calls = type(store).open, []

    def fail_at_first(self, *args, **kwargs):
        calls.append(args)
        if len(calls) <= failures:
            raise TimeoutError("no answer")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(store), "open", fail_at_first)
    if failures < cache_module.ATTEMPTS:
        assert read(cache, "a") == b"a" * SIZE
    else:
        with pytest.raises(ShardError, match="TimeoutError: no answer") as caught:
            cache.open(url("a"))
        assert (caught.value.where, bool(caught.value.remedy)) == (url("a"), True)
        assert copies(cache) == {}
    assert len(calls) == min(failures + 1, cache_module.ATTEMPTS)


@pytest.mark.parametrize("error", [PermissionError("forbidden"), FileNotFoundError("gone")])
def test_what_can_not_get_better_is_not_tried_again(cache, store, monkeypatch, error):
    calls = []

    def refuse(*_, **__):
        calls.append(1)
        raise error

    cache.size(url("a"))
    monkeypatch.setattr(type(store), "open", refuse)
    with pytest.raises(ShardError):
        cache.open(url("a"))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://store/z.tar", "does not exist"),
        ("nonsense://store/a.tar", "the URL can't be read"),
        ("gdrive://store/a.tar", "needs a package"),
    ],
)
def test_what_is_not_there(cache, store, address, message):
    with pytest.raises(ShardError, match=message) as caught:
        cache.open(address)
    assert caught.value.where == address
    assert caught.value.remedy


def test_a_shard_larger_than_the_cache_is_refused_and_removes_nothing(cache, store):
    read(cache, "a")
    store.pipe("/store/z.tar", b"z" * (3 * SIZE + 1))
    with pytest.raises(ShardError, match="more than the cache") as caught:
        cache.open(url("z"))
    assert "cache_bytes" in caught.value.remedy
    assert copies(cache) == {"a.tar": SIZE}


def test_a_folder_that_can_not_be_written_is_named(tmp_path, store):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match="can't be written") as caught:
        ShardCache(tmp_path / "file" / "cache", SIZE).open(url("a"))
    assert "cache_dir" in caught.value.remedy


def test_a_full_disk_is_named(small_disk, store):
    store.pipe("/store/z.tar", bytes(2 << 20))
    with pytest.raises(ShardError, match="No space left"):
        ShardCache(small_disk, 10 << 20).open(url("z"))


def test_the_rest_of_a_killed_copy_makes_room(cache, store):
    cache._folder.mkdir()
    for name in (f"{'0' * 24}-x.tar.part", f".{'1' * 24}-x.idxab_cdefg.idx.tmp"):
        (cache._folder / name).write_bytes(bytes(3 * SIZE))
    assert read(cache, "a") == b"a" * SIZE
    assert copies(cache) == {"a.tar": SIZE}


@pytest.mark.parametrize("rest", ["{}.part", ".{}12345678.idx.tmp"])
def test_the_rest_of_its_own_killed_copy_is_not_waited_for(cache, store, rest):
    cache._folder.mkdir()
    name = os.path.basename(cache.path(url("a")))
    (cache._folder / rest.format(name)).write_bytes(bytes(3 * SIZE))
    reader = threading.Thread(target=read, args=(cache, "a"), daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    assert copies(cache) == {"a.tar": SIZE}


def test_files_of_others_are_neither_touched_nor_counted(cache, store, tmp_path):
    """A folder that the user has other things in may be given."""
    (cache._folder / "photos").mkdir(parents=True)
    (cache._folder / ("0" * 24 + "-folder.tar")).mkdir()
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (cache._folder / ("1" * 24 + "-link.tar")).symlink_to(tmp_path / "elsewhere")
    for name in ("thesis.docx", "a.tar", "a.tar.part", ".a.idx.tmp", "evict.lock", "photos/1.jpg"):
        (cache._folder / name).write_bytes(bytes(9 * SIZE))
    before = set(cache._folder.rglob("*"))
    for letter in "abcde":
        assert read(cache, letter) == letter.encode() * SIZE
    assert set(cache._folder.rglob("*")) >= before
    assert (cache._folder / "evict.lock").stat().st_size == 9 * SIZE
    ours = [path for path in cache._folder.glob("*.tar") if path not in before]
    assert len(ours) == 3


def test_a_folder_in_the_place_of_a_copy_is_named(cache, store):
    os.makedirs(cache.path(url("a")))
    with pytest.raises(ShardError, match="cache of shards can't be written") as caught:
        cache.open(url("a"))
    assert url("a") in caught.value.where


@pytest.mark.parametrize("unfinished", ["-x.tar.part", "-x.idx.part", "-x.idx12345678.idx.tmp"])
def test_a_cache_full_of_copies_being_made_is_waited_for(cache, store, unfinished):
    """And what another process copies is not removed."""
    cache._folder.mkdir()
    part = cache._folder / ("0" * 24 + unfinished)
    if unfinished.endswith(".tmp"):
        part = part.with_name("." + part.name)
    part.write_bytes(bytes(3 * SIZE))
    script = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(cache._folder / ("0" * 24 + ".lock"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        reader = threading.Thread(target=read, args=(cache, "a"))
        reader.start()
        reader.join(3 * cache_module.WAIT_S)
        assert reader.is_alive()
        assert part.exists()
        other.communicate(b"\n")
    reader.join()
    assert copies(cache) == {"a.tar": SIZE}


READ_ALL = """
import sys, random
from megablip.data.cache import ShardCache
store, folder, limit, seed = sys.argv[1:]
cache, names = ShardCache(folder, int(limit)), random.Random(int(seed)).choices("abcdefgh", k=60)
for name in names:
    with cache.open(f"file://{store}/{name}.tar") as file:
        assert file.read() == name.encode() * 40_000, name
"""


def test_several_processes_share_a_bounded_cache(tmp_path):
    (tmp_path / "store").mkdir()
    for letter in "abcdefgh":
        (tmp_path / "store" / f"{letter}.tar").write_bytes(letter.encode() * 40_000)
    folder, limit = tmp_path / "cache", 3 * 40_000
    arguments = [str(tmp_path / "store"), str(folder), str(limit)]
    processes = [subprocess.Popen([sys.executable, "-c", READ_ALL, *arguments, str(seed)]) for seed in range(5)]
    most = 0
    while any(process.poll() is None for process in processes):
        if folder.exists():  # under the lock, as nothing is added meanwhile
            with cache_module.FileLock(folder / "megablip-evict.lock"):
                most = max(most, sum(copies(ShardCache(folder, limit)).values()))
        time.sleep(0.002)
    assert [process.returncode for process in processes] == [0] * 5
    assert 0 < most <= limit
    assert not list(folder.glob("*.part"))


def test_names_and_globs(store):
    assert [is_url(path) for path in ("s3://a/b.tar", "memory://a", "/a/b.tar", "a:b", "C://x")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    for pattern, count in (("memory://store/[ab].tar", 2), ("memory://store", 10), ("memory://store/*", 10)):
        found = glob_url(pattern)
        assert [os.path.basename(name) for name in found] == [f"{letter}.tar" for letter in "abcdefghij"[:count]]
        assert all(is_url(name) for name in found)
