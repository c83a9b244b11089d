import gzip
import io
import os
import re
import tarfile
import time
from contextlib import suppress

import numpy as np
import pytest
import webdataset

from megablip.data import shards
from megablip.data.shards import ShardSource, expand_shards, index_path, read_count
from megablip.errors import SampleError, ShardError
from tests.data.builders import write_tar

LONG_NAME = "folder/" + "n" * 150


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


def add(tar, name, data=b"x", kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data) if kind == tarfile.REGTYPE else 0
    member.linkname = "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_webdataset_reads(tmp_path, tar_format):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        add(tar, "folder", kind=tarfile.DIRTYPE)
        add(tar, "__meta__", b"skipped")
        add(tar, "__index__/a.txt", b"skipped")
        add(tar, "folder/a.jpg", b"1" * 700)
        add(tar, "no_extension", b"skipped")
        add(tar, "folder/link.jpg", kind=tarfile.SYMTYPE)
        add(tar, "folder/hard.jpg", kind=tarfile.LNKTYPE)
        add(tar, "folder/a.seg.PNG", b"")
        add(tar, "b.txt", "ä".encode())
        add(tar, LONG_NAME[:90] + ".txt", b"long")
        if tar_format != tarfile.USTAR_FORMAT:
            add(tar, LONG_NAME + ".txt", b"longer")
            add(tar, "ü with space.txt", b"no text line can hold this name")
        add(tar, "../../etc/passwd.txt", b"a name only, never a path")
    assert read_all(path) == by_webdataset(path)
    assert len(read_all(path)) >= 4


def test_index_has_the_format_of_wds2idx(shard):
    source = ShardSource("test", [str(shard)])
    assert source.total == 12
    lines = (shard.parent / "part-000.idx").read_text().splitlines()
    assert lines[0] == "v1.2 12"
    assert re.fullmatch(r"txt 512 6 000000\.txt 0\.png 1536 0 000000\.0\.PNG json 2048 2 000000\.json", lines[1])
    with tarfile.open(shard) as tar:  # every offset is that of the standard library
        expected = [f"{m.offset_data} {m.size} {m.name}" for m in tar]
    fields = " ".join(lines[1:]).split()
    assert [" ".join(fields[i + 1 : i + 4]) for i in range(0, len(fields), 4)] == expected


def test_an_index_of_another_tool_is_used(shard):
    ShardSource("test", [str(shard)]).counts  # noqa: B018
    text = (shard.parent / "part-000.idx").read_text().replace("0.png", "0.PNG")  # wds2idx keeps the case
    (shard.parent / "part-000.idx").write_text(text)
    assert read_all(shard) == by_webdataset(shard)
    assert (shard.parent / "part-000.idx").read_text() == text


def test_an_index_is_reused_and_a_changed_shard_indexed_again(shard, monkeypatch):
    assert len(read_all(shard)) == 12
    with monkeypatch.context() as patch:
        patch.setattr(shards, "build_index", lambda path: pytest.fail("indexed again"))
        assert len(read_all(shard)) == 12
    write_tar(shard, [{"txt": b"new"}] * 5)
    os.utime(shard, ns=(time.time_ns() + 10**6,) * 2)
    assert [members["txt"] for _, members in read_all(shard)] == [b"new"] * 5


@pytest.mark.parametrize("change", ["shorter", "longer", "other", "appended", "cut index", "wrong count", "no index"])
def test_an_index_of_another_shard_is_not_trusted(shard, change):
    """Even if its time stamp is newer than the shard's."""
    index = shard.parent / "part-000.idx"
    assert ShardSource("test", [str(shard)]).total == 12
    samples = [{"txt": b"text %d" % n} for n in range({"shorter": 3, "longer": 40}.get(change, 12))]
    if change in ("shorter", "longer", "other"):
        write_tar(shard, samples)
    elif change == "appended":
        with tarfile.open(shard, "a") as tar:
            add(tar, "later.txt")
    elif change == "cut index":
        index.write_bytes(index.read_bytes()[:-30])
    elif change == "wrong count":
        index.write_text(index.read_text().replace("v1.2 12", "v1.2 13"))
    else:
        index.write_bytes(b"\x80\x04 a pickle, say")
    os.utime(index, ns=(time.time_ns() + 10**9,) * 2)
    if change == "wrong count":  # only a full read shows it
        with pytest.raises(ShardError, match="disagree"):
            read_all(shard)
    else:
        assert read_count(str(shard)) is None
        assert read_all(shard) == by_webdataset(shard)


def test_a_read_only_folder_is_indexed_in_memory(shard, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(shards.tempfile, "mkstemp", refuse)
    assert read_all(shard) == by_webdataset(shard)
    assert os.listdir(shard.parent) == ["part-000.tar"]


def test_a_file_of_another_format_is_not_overwritten(shard):
    index = shard.parent / "part-000.idx"
    index.write_bytes(b"MMIDIDX\x00\x00 Megatron's")
    assert read_all(shard) == by_webdataset(shard)
    assert index.read_bytes().startswith(b"MMIDIDX")


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    paths = [str(write_tar(tmp_path / f"{n}.tar", [{"txt": b"%d" % n}] * (n + 1))) for n in range(5)]
    source = ShardSource("test", paths)
    assert source.counts.tolist() == [1, 2, 3, 4, 5]
    for _ in range(2):
        assert [source.read(n, n)[1]["txt"] for n in range(5)] == [b"%d" % n for n in range(5)]
    open_files = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
    assert len(open_files & set(paths)) <= 2


def _is_link(fd):
    return os.path.islink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("fields", ["txt 512 -6 a.txt", "txt -512 6 a.txt", f"txt {2**70} 6 a.txt", "txt 512 6 a"])
def test_an_index_with_impossible_numbers_is_refused(tmp_path, fields):
    shard = write_tar(tmp_path / "a.tar", [{"__key__": b"a", "txt": b"first"}, {"__key__": b"b", "txt": b"second"}])
    ShardSource("test", [str(shard)]).counts  # noqa: B018
    header, _, last = (tmp_path / "a.idx").read_text().splitlines()
    (tmp_path / "a.idx").write_text(f"{header}\n{fields}\n{last}\n")
    with pytest.raises(ShardError, match="disagree"):
        ShardSource("test", [str(shard)]).read(0, 0)


@pytest.mark.parametrize("share", np.linspace(0.01, 0.99, 15))
def test_a_truncated_shard_is_named_with_its_offset(shard, share):
    with tarfile.open(shard) as tar:
        content = tar.getmembers()[-1].offset_data + 512  # what follows is padding and may be cut
    os.truncate(shard, int(content * share))
    with pytest.raises(ShardError) as caught:
        ShardSource("test", [str(shard)]).counts  # noqa: B018
    assert "truncated" in caught.value.what or "not a tar" in caught.value.what
    assert str(shard) in caught.value.where
    assert "offset" in caught.value.where
    assert caught.value.remedy
    assert not os.path.exists(index_path(str(shard)))


def test_a_shard_cut_between_two_members_is_truncated(shard):
    with tarfile.open(shard) as tar:
        os.truncate(shard, tar.getmembers()[9].offset)
    with pytest.raises(ShardError, match="no end-of-archive"):
        ShardSource("test", [str(shard)]).counts  # noqa: B018


def test_a_broken_header_is_not_taken_for_the_end(shard):
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[9].offset
    data = bytearray(shard.read_bytes())
    data[offset + 5] ^= 64
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="damaged"):
        ShardSource("test", [str(shard)]).counts  # noqa: B018


def test_a_shard_truncated_after_indexing_is_noticed_on_reading(shard):
    source = ShardSource("test", [str(shard)])
    assert source.total == 12
    os.truncate(shard, 3000)
    with pytest.raises(ShardError, match="ends early"):
        source.read(0, 11)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zero bytes"),
        (gzip.compress(b"tar"), r"compressed \(gzip\)"),
        (b"\x28\xb5\x2f\xfd rest", r"compressed \(zstd\)"),
        (b"<html>not found</html>" * 50, "not a tar"),
        (bytes(10240), "no sample"),
        (bytes(100), "not a tar"),
    ],
)
def test_what_is_no_shard(tmp_path, content, message):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message) as caught:
        ShardSource("test", [str(path)]).counts  # noqa: B018
    assert str(path) in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt", "b.txt", "a.jpg"], "duplicate key 'a'"),
        (["a.txt", "b.txt", "b.txt"], "two members of one extension"),
        (["a.jpg", "a.JPG"], "two members of one extension"),
    ],
)
def test_keys_that_clash(tmp_path, names, message):
    path = tmp_path / "clash.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name)
    with pytest.raises(ShardError, match=message):
        ShardSource("test", [str(path)]).counts  # noqa: B018


def test_hostile_headers_end_with_a_message(tmp_path):
    """Random damage to headers: a ShardError or the samples, nothing else, and in finite time."""
    good = write_tar(tmp_path / "good.tar", [{"txt": b"x" * 30}] * 4).read_bytes()
    numbers = np.random.default_rng(0)
    for trial in range(150):
        data = bytearray(good)
        start = 1024 * int(numbers.integers(4))
        for _ in range(3):
            data[start + int(numbers.integers(100, 512))] = int(numbers.integers(256))
        header = data[start : start + 512]
        header[148:156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(header)  # a checksum that fits
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(data)
        with suppress(ShardError):
            read_all(path)


def test_a_member_too_large_is_a_bad_sample(shard, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    source = ShardSource("test", [str(shard)])
    assert source.read(0, 5)[0] == "000005"
    with pytest.raises(SampleError, match="above the limit"):
        source.read(0, 11)
    path, key, offset = source.where(0, 11)
    assert (path, key) == (str(shard), "000011")
    assert shard.read_bytes()[offset : offset + 7] == b"text 11"


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
    ]:
        with pytest.raises(ShardError, match=message) as caught:
            expand_shards(spec)
        assert str(tmp_path) in caught.value.where
        assert caught.value.remedy
