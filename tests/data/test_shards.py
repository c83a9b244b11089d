import os
import tarfile

import numpy as np
import pytest
import webdataset

from megablip.data import shards
from megablip.data.cache import ShardCache
from megablip.data.index import PARALLEL_SHARDS, index_path
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import SampleError, ShardError
from tests.data.builders import raw_member, write_tar


@pytest.fixture
def shard(tmp_path):
    samples = [{"txt": b"text %d" % n, "0.PNG": bytes([n]) * (n * 100), "json": b"{}"} for n in range(12)]
    return write_tar(tmp_path / "part-000.tar", samples)


def read_all(path):
    source = ShardSource("test", [str(path)])
    return [source.read(0, sample) for sample in range(source.total)]


def by_webdataset(path):
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {ext: data for ext, data in s.items() if not ext.startswith("__")}) for s in dataset]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_webdataset_reads(tmp_path, tar_format):
    """Members of all sizes around what is read at once, in all orders; long names, and names no text line can hold."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 3000, 16383, 16384, 16385, 33000, 100_000]
    samples = []
    for number in range(60):
        members = {f"{n}.BIN": rng.bytes(int(rng.choice(sizes))) for n in range(rng.integers(1, 6))}
        long_name = "d" * 80 + "/" + "n" * (80 if number % 3 else 3) + " " * (number % 7 == 0)
        samples.append({"__key__": f"{long_name}{number}".encode(), **members})
    path = write_tar(tmp_path / "a.tar", samples, tar_format)
    expected = by_webdataset(path)
    assert read_all(path) == expected
    source = ShardSource("test", [str(path)])
    for sample in rng.permutation(len(samples)).tolist():
        assert source.read(0, sample) == expected[sample]


def test_members_that_are_not_adjacent_in_the_file(tmp_path):
    """Links and metadata between the members of a sample are passed over."""
    between = raw_member(b"__meta__", b"m" * 40_000) + raw_member(b"no_extension", b"n" * 900)
    path = tmp_path / "a.tar"
    path.write_bytes(raw_member(b"a.txt", b"1") + between + raw_member(b"a.json", b"{}") + bytes(1024))
    assert read_all(path) == [("a", {"txt": b"1", "json": b"{}"})]


def test_damaged_shards_are_read_around_the_damage(shard):
    expected = by_webdataset(shard)
    with tarfile.open(shard) as tar:
        offset = next(member.offset for member in tar if member.name == "000004.json")
    data = bytearray(shard.read_bytes())
    data[offset + 3] ^= 1
    shard.write_bytes(data)
    for _ in range(2):  # walked, then by the index
        source = ShardSource("test", [str(shard)])
        assert [source.read(0, sample) for sample in range(source.total)] == expected[:4] + expected[5:]
        assert [(damage.offset, damage.samples) for damage in source.damage(0)] == [(offset, 1)]
    assert ShardSource("test", [str(write_tar(shard.parent / "good.tar", [{"txt": b"x"}]))]).damage(0) == []


def test_one_shard_is_counted_without_the_others(tmp_path):
    paths = [str(write_tar(tmp_path / f"{n}.tar", [{"txt": b"x"}] * (n + 1))) for n in range(3)]
    source = ShardSource("test", paths)
    assert source.count(1) == 2
    assert [os.path.exists(index_path(path)) for path in paths] == [False, True, False]
    assert source.counts.tolist() == [1, 2, 3]
    assert source.total == 6


def test_names_and_headers_tell_shards_apart_however_they_become_known(tmp_path):
    paths = [str(write_tar(tmp_path / f"{n}.tar", [{"txt": b"%d" % n}] * (n + 1))) for n in range(PARALLEL_SHARDS)]
    walked = ShardSource("test", paths)
    expected = walked.headers  # by processes
    assert ShardSource("test", paths).headers == expected  # by the indexes
    os.unlink(index_path(paths[3]))
    assert ShardSource("test", paths).headers == expected  # by this process
    assert ShardSource("test", paths[1:]).headers != expected
    write_tar(paths[3], [{"__key__": b"other%d" % n, "txt": b"3"} for n in range(4)])
    assert ShardSource("test", paths).headers != expected
    assert ShardSource("test", [f"elsewhere/{n}.tar" for n in range(PARALLEL_SHARDS)]).names == walked.names
    assert ShardSource("test", [*paths[1:], "9.tar"]).names != walked.names


def test_a_shard_changed_before_the_run_is_indexed_again(shard):
    assert len(read_all(shard)) == 12
    write_tar(shard, [{"txt": b"new" * 9000}] * 5)
    assert [members["txt"] for _, members in read_all(shard)] == [b"new" * 9000] * 5


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("change", ["cut", "longer", "same size"])
def test_a_shard_changed_in_the_run_is_named(shard, change, opened):
    source = ShardSource("test", [str(shard)])
    assert source.total == 12
    if opened:
        source.read(0, 0)
    if change == "cut":
        os.truncate(shard, 3000)
    elif change == "longer":
        write_tar(shard, [{"txt": b"new" * 9000}] * 5)
    else:  # other samples at other places
        size = shard.stat().st_size
        write_tar(shard, [{"txt": b"text", "0.PNG": b"p" * (1200 - n * 100), "json": b"{}"} for n in range(11)])
        os.truncate(shard, size)
    with pytest.raises(ShardError, match="disagree") as caught:
        [source.read(0, sample) for sample in range(11, -1, -1)]
    assert str(shard) in caught.value.where
    assert "source test" in caught.value.where
    assert ".idx" in caught.value.remedy


def test_a_shard_cut_inside_a_member_while_it_is_read_is_named(shard):
    source = ShardSource("test", [str(shard)])
    _, _, offset = source.where(0, 11)
    os.truncate(shard, offset + 1024 + 700)
    with pytest.raises(ShardError, match=r"'000011\.0\.PNG' at offset \d+ ends early"):
        source.read(0, 11)


@pytest.mark.parametrize("size", [100, 20_000])
def test_the_header_of_a_lone_member_is_looked_at(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", [{"__key__": b"%d" % n, "jpg": b"x" * size} for n in range(3)])
    source = ShardSource("test", [str(path)])
    assert source.read(0, 1)[0] == "1"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.jpg", b"7.jpg"))
    with pytest.raises(ShardError, match=r"'1\.jpg' is not at offset"):
        source.read(0, 1)


def test_a_line_that_is_no_sample_is_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [{"txt": b"x"}] * 3)
    ShardSource("test", [str(shard)]).counts  # noqa: B018
    path = tmp_path / "a.idx"
    path.write_text(path.read_text().replace("txt 1536 1 000001.txt", "txt 1536 -1 000001.txt"))
    with pytest.raises(ShardError, match="line 3 of its index is not one webdataset sample"):
        ShardSource("test", [str(shard)]).read(0, 1)
    with pytest.raises(ShardError, match="sample 3 was asked for"):
        ShardSource("test", [str(shard)]).read(0, 3)


def test_a_read_only_folder_is_walked_once(shard, monkeypatch):
    shard.parent.chmod(0o555)
    monkeypatch.setattr("megablip.data.index.tempfile.mkstemp", lambda **_: exec('raise PermissionError("read-only")'))
    source = ShardSource("test", [str(shard)])
    assert [source.read(0, sample) for sample in range(source.total)] == by_webdataset(shard)
    monkeypatch.setattr("megablip.data.index.walk", lambda *_: pytest.fail("walked again"))
    source.close()
    assert source.read(0, 3)[0] == "000003"
    shard.parent.chmod(0o755)


def test_indexes_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "IN_MEMORY_BYTES", 500)
    paths = [str(write_tar(tmp_path / f"{n}.tar", [{"__key__": b"a b", "txt": b"x"}])) for n in range(40)]
    source = ShardSource("test", paths)
    assert source.total == 40
    for shard in (*range(40), 0):
        assert source.read(shard, 0)[0] == "a b"
    assert sum(index.unsaved_bytes for index in source._in_memory.values()) <= 500


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    paths = [str(write_tar(tmp_path / f"{n}.tar", [{"txt": b"%d" % n}] * (n + 1))) for n in range(5)]
    source = ShardSource("test", paths)
    assert source.counts.tolist() == [1, 2, 3, 4, 5]
    for _ in range(2):
        assert [source.read(n, n)[1]["txt"] for n in range(5)] == [b"%d" % n for n in range(5)]
    assert len(open_files() & set(paths)) == 2
    source.close()
    assert not open_files() & {*paths, *map(index_path, paths)}


def open_files():
    links = (f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in links if os.path.islink(link)}


def test_a_member_too_large_is_a_bad_sample(shard, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    source = ShardSource("test", [str(shard)])
    assert source.read(0, 5)[0] == "000005"
    with pytest.raises(SampleError, match="above the limit") as caught:
        source.read(0, 11)
    assert str(shard) in caught.value.where
    path, key, offset = source.where(0, 11)
    assert (path, key) == (str(shard), "000011")
    assert shard.read_bytes()[offset : offset + 7] == b"text 11"


def test_a_sample_too_large_is_a_bad_sample(shard, monkeypatch):
    """Though each of its members is not; also where heads are enough, as the planner must come to the same."""
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 1000)
    source = ShardSource("test", [str(shard)])
    assert source.read(0, 9)[0] == "000009"
    monkeypatch.setattr(shards.os, "pread", lambda *_: pytest.fail("read"))
    for is_enough in (None, lambda head, size: True):
        with pytest.raises(SampleError, match="the sample has 1009 bytes, above the limit of 1000") as caught:
            source.read(0, 10, is_enough)
        assert caught.value.where == f"{shard}, offset {source.where(0, 10)[2]}"


def test_of_a_long_member_the_head_may_be_enough(tmp_path):
    long, short = bytes(range(256)) * 128, b"s" * 9000
    path = write_tar(tmp_path / "a.tar", [{"txt": b"words", "jpg": long, "png": long, "gif": short}] * 2)
    source, asked = ShardSource("test", [str(path)]), []

    def is_enough(head, size):
        asked.append((head, size))
        return len(asked) == 1

    _, members = source.read(0, 1, is_enough)
    assert members == {"txt": b"words", "jpg": long[: shards.HEAD_BYTES], "png": long, "gif": short}
    assert asked == [(long[: shards.HEAD_BYTES], len(long))] * 2
    os.truncate(path, source.where(0, 1)[2] + 2000)
    with pytest.raises(ShardError, match="ends early"):
        source.read(0, 1, lambda head, size: True)


# --- remote shards ------------------------------------------------------------


@pytest.fixture
def remote(tmp_path):
    """Ten shards behind URLs, and a cache for three of them."""
    paths = [write_tar(tmp_path / "store" / f"{n}.tar", [{"txt": b"%d" % n}] * (n + 1)) for n in range(10)]
    return [f"file://{path}" for path in paths], ShardCache(tmp_path / "cache", 3 * 20_480)


def test_remote_shards_are_read_through_the_cache(remote):
    urls, cache = remote
    source = ShardSource("test", urls, cache=cache)
    assert source.counts.tolist() == list(range(1, 11))
    for shard in (3, 9, 0, 3):
        assert source.read(shard, shard)[1]["txt"] == b"%d" % shard
    assert source.where(3, 0)[0] == urls[3]


def test_few_copies_stay_open_after_the_cache_removed_them(remote):
    """Else they would take disk space that nothing bounds."""
    urls, cache = remote
    source = ShardSource("test", urls, cache=cache)
    for shard in (*range(10), *range(10)):
        assert source.read(shard, 0)[1]["txt"] == b"%d" % shard
        assert len([name for name in open_files() if str(cache._folder) in name]) <= shards.OPEN_REMOTE_SHARDS
    assert source.count(9) == 10


def test_a_copy_that_is_still_there_is_opened_again_without_a_fetch(remote, monkeypatch):
    urls, cache = remote
    source = ShardSource("test", urls[:3], cache=cache)
    for shard in range(3):
        source.read(shard, 0)
    monkeypatch.setattr(cache, "_download", lambda *_: pytest.fail("fetched again"))
    monkeypatch.setattr(shards, "build_index", lambda *_: pytest.fail("indexed again"))
    for shard in (0, 1, 2, 0, 2, 1):
        assert source.read(shard, 0)[1]["txt"] == b"%d" % shard


def test_local_shards_stay_open_beside_remote_ones(remote, monkeypatch):
    urls, cache = remote
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    paths = [url.removeprefix("file://") for url in urls]
    source = ShardSource("test", [*paths[:5], *urls[5:]], cache=cache)
    for shard in range(10):
        source.read(shard, 0)
    assert list(source._open) == [2, 3, 4, 8, 9]


def test_an_index_is_made_under_the_lock_of_its_shard(remote, monkeypatch):
    """Where another process that makes room can see that its temporary file is in use."""
    urls, cache = remote
    whole, seen = shards.build_index, []

    def build(path, file):
        name = f".{os.path.basename(index_path(path))[:40]}12345678.idx.tmp"
        seen.append(cache._is_abandoned(name))
        return whole(path, file)

    monkeypatch.setattr(shards, "build_index", build)
    ShardSource("test", urls[:1], cache=cache).read(0, 0)
    assert seen == [False]


def test_remote_indexes_are_enough_to_count(remote):
    urls, cache = remote
    ShardSource("test", [url.removeprefix("file://") for url in urls]).counts  # noqa: B018
    assert ShardSource("test", urls, cache=cache).counts.tolist() == list(range(1, 11))
    assert not list(cache._folder.glob("*.tar"))


def test_a_remote_index_of_another_shard_is_not_used(remote):
    urls, cache = remote
    ShardSource("test", [url.removeprefix("file://") for url in urls]).counts  # noqa: B018
    write_tar(urls[2].removeprefix("file://"), [{"txt": b"x" * 2000}] * 7)
    source = ShardSource("test", urls, cache=cache)
    assert source.count(2) == 7
    assert source.read(2, 6)[1]["txt"] == b"x" * 2000


def test_errors_of_remote_shards_name_the_url(remote, tmp_path):
    urls, cache = remote
    (tmp_path / "store" / "bad.tar").write_bytes(b"<html>not found</html>" * 50)
    bad = f"file://{tmp_path}/store/bad.tar"
    with pytest.raises(ShardError, match="not a tar") as caught:
        ShardSource("test", [bad], cache=cache).read(0, 0)
    assert bad in caught.value.where
    with pytest.raises(ShardError, match="does not exist") as caught:
        ShardSource("test", [bad + ".gone"], cache=cache).counts  # noqa: B018
    assert bad in caught.value.where
    with pytest.raises(ShardError, match="needs a cache"):
        ShardSource("test", urls)


# --- names --------------------------------------------------------------------


def test_expansion(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "notes.md"):
        (tmp_path / name).write_bytes(b"")

    def names(spec):
        return [os.path.basename(path) for path in expand_shards(spec)]

    assert names(f"{tmp_path}/a-{{0..1}}.tar") == ["a-0.tar", "a-1.tar"]
    assert names(f"{tmp_path}/?-0.tar") == ["a-0.tar", "b-0.tar"]
    assert names(str(tmp_path)) == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert names([f"{tmp_path}/b-0.tar", f"{tmp_path}/*.tar", f"{tmp_path}/./a-0.tar"]) == [
        "a-0.tar",
        "a-1.tar",
        "b-0.tar",
    ]
    for spec in (f"file://{tmp_path}/a-*.tar", f"file://{tmp_path}/a-{{0..1}}.tar"):
        assert expand_shards(spec) == [f"file://{tmp_path}/a-0.tar", f"file://{tmp_path}/a-1.tar"]
    assert len(expand_shards(f"file://{tmp_path}/")) == 3
    assert expand_shards(["s3://bucket/a b?x=1.tar", "s3://bucket/{0..1}/c.tar"]) == [
        "s3://bucket/0/c.tar",
        "s3://bucket/1/c.tar",
        "s3://bucket/a b?x=1.tar",
    ]


def test_expansion_that_gives_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec, message in [
        (f"{tmp_path}/x.tar", "does not exist"),
        (f"{tmp_path}/x-{{0..3}}.tar", "does not exist"),
        (f"{tmp_path}/empty", "the folder is empty"),
        (f"{tmp_path}/empty/*.tar", "the folder is empty"),
        (f"{tmp_path}/gone/*.tar", "the folder does not exist"),
        (f"{tmp_path}/*.tar", "holds other files only"),
        (f"{tmp_path}/x-{{0..3.tar", "unbalanced braces"),
        (f"file://{tmp_path}/*.tar", "no shard matches"),
    ]:
        with pytest.raises(ShardError, match=message) as caught:
            expand_shards(spec)
        assert str(tmp_path) in caught.value.where
        assert caught.value.remedy
