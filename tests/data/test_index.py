import inspect
import os
import re
import subprocess
import sys
import tarfile
import time
from contextlib import suppress

import pytest
from rich.progress import Progress

from megablip.data import index, tar
from megablip.data.index import IndexHead, build_index, count_samples, index_path, load_index, open_shard
from megablip.data.tar import Damage, walk
from megablip.errors import MegablipError, ShardError
from tests.data.builders import add_member, header, raw_member, write_tar

SAMPLES = [{"txt": b"text %d" % n, "0.PNG": bytes([n]) * (n * 100), "json": b"{}"} for n in range(150)]


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "part-000.tar", SAMPLES)


def build(path):
    with open_shard(str(path)) as file:
        return build_index(str(path), file)


def load(path):
    with open_shard(str(path)) as file:
        return load_index(str(path), file)


def samples(found):
    return [found.sample(number) for number in range(len(found))]


def newer(path):
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)


def test_the_format_is_that_of_wds2idx(shard):
    assert len(build(shard)) == 150
    lines = (shard.parent / "part-000.idx").read_text().splitlines()
    end = 150 * 3 * 1024 + sum(-(-len(s["0.PNG"]) // 512) * 512 - 512 for s in SAMPLES)
    assert re.fullmatch(rf"v1\.2 150 bytes={shard.stat().st_size} end={end} headers=[0-9a-f]{{16}}", lines[0])
    assert lines[1] == "txt 512 6 000000.txt 0.png 1536 0 000000.0.PNG json 2048 2 000000.json"
    with tarfile.open(shard) as archive:  # every offset is that of the standard library
        expected = [f"{m.offset_data} {m.size} {m.name}" for m in archive]
    fields = " ".join(lines[1:]).split()
    assert [" ".join(fields[i + 1 : i + 4]) for i in range(0, len(fields), 4)] == expected


@pytest.mark.parametrize("limit", [0, 1 << 16])
def test_lines_are_read_in_any_order(shard, limit, monkeypatch):
    monkeypatch.setattr(index, "MAX_TEXT_BYTES", limit)
    before = len(os.listdir("/proc/self/fd"))
    found = build(shard)
    assert len(os.listdir("/proc/self/fd")) == before + (not limit)
    expected = samples(found)
    assert [key for key, _ in expected] == [f"{n:06d}" for n in range(150)]
    for number in (149, 0, 1, 64, 65, 63, 128, 129, 127, 5):
        assert found.sample(number) == expected[number]
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "head",
    [
        IndexHead(3),
        IndexHead(3, 10240, 9000, "0123456789abcdef"),
        IndexHead(9, 512, 512, "00", (Damage(5, 7, "no valid header", 2), Damage(512, 1024, "zeros", 0))),
    ],
)
def test_the_first_line_comes_back(head):
    line = bytes(head) if head.size_bytes >= 0 else b"v1.2 3\n"
    assert IndexHead.parse(line) == head
    version, count = line.split()[:2]  # what DALI reads of it
    assert (version, int(count)) == (b"v1.2", head.samples)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"v1.2\n", b"v1.2 0\n", b"v1.2 3", b"v1.1 3\n", b"v1.2 -3\n", b"v1.2 " + b"9" * 30 + b"\n"]
)
def test_what_is_no_first_line(line):
    assert IndexHead.parse(line) is None


def test_odd_fields_of_the_first_line_are_passed_over():
    assert IndexHead.parse(b"v1.2 3 bytes=x end=-4 damaged=1-2 later=5\n") == IndexHead(3)


def test_an_index_of_another_tool_is_used(shard):
    expected = [(key, [member[1:] for member in members]) for key, members in samples(build(shard))]
    path = shard.parent / "part-000.idx"
    text = re.sub(r"^v1.2 150 .*", "v1.2 150", path.read_text()).replace("0.png", "0.PNG")  # wds2idx keeps the case
    path.write_text(text)
    found = load(shard)
    assert [(key, [member[1:] for member in members]) for key, members in samples(found)] == expected
    assert found.sample(3)[1][1][0] == "0.png"
    newer(shard)
    assert load(shard) is None


CHANGES = [
    "shorter",
    "longer",
    "renamed",
    "last renamed",
    "appended",
    "cut index",
    "wrong count",
    "no index",
    "long lines",
    "pickle",
]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_an_index_of_another_shard_is_not_trusted(shard, change, ours):
    """Even if its time stamp is newer than the shard's."""
    path = shard.parent / "part-000.idx"
    build(shard)
    if not ours:
        path.write_text(re.sub(r"^v1.2 150 .*", "v1.2 150", path.read_text()))
    if change in ("shorter", "longer"):
        write_tar(shard, SAMPLES[: 3 if change == "shorter" else 150] * 2)
    elif change == "renamed":
        write_tar(shard, [{"__key__": b"x%05d" % n, **sample} for n, sample in enumerate(SAMPLES)])
    elif change == "last renamed":
        write_tar(shard, [*SAMPLES[:-1], {"__key__": b"x", **SAMPLES[-1]}])
    elif change == "appended":
        with tarfile.open(shard, "a") as archive:
            add_member(archive, "later.txt")
    elif change == "cut index":
        path.write_bytes(path.read_bytes()[:-30])
    elif change == "wrong count":
        path.write_text(path.read_text().replace("v1.2 150", "v1.2 151"))
    elif change == "no index":
        path.unlink()
    elif change == "long lines":
        path.write_bytes(path.read_bytes() + b" " * shard.stat().st_size)
    else:
        path.write_bytes(b"\x80\x04 a pickle, say")
    if path.exists():
        newer(path)
    assert load(shard) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "txt 512 6",
        "txt 512 6 a",
        "txt x 6 a.txt",
        "txt 0 6 a.txt",
        "txt 513 6 a.txt",
        "txt 512 -6 a.txt",
        "txt -512 6 a.txt",
        f"txt {2**70} 6 a.txt",
        f"txt {'9' * 5000} 6 a.txt",
        "txt 512 6 a.txt jpg 1536 5 b.jpg",
    ],
)
def test_a_line_with_impossible_fields_is_no_sample(tmp_path, line):
    shard = write_tar(tmp_path / "a.tar", [{"__key__": key, "txt": b"first"} for key in (b"a", b"b", b"c")])
    build(shard)
    head, first, _, last = (tmp_path / "a.idx").read_text().splitlines()
    (tmp_path / "a.idx").write_text(f"{head}\n{first}\n{line}\n{last}\n")
    found = load(shard)
    assert found.sample(1) is None
    assert found.sample(2)[0] == "c"


def test_extensions_in_any_script(tmp_path):
    """A letter may become two in lower case."""
    path = write_tar(tmp_path / "a.tar", [{"İ": b"1", "ÄPNG": b"2"}, {"x.İ": b"3", "json": b"{}"}])
    assert samples(build(path)) == samples(load(path))
    assert [key for key, _ in samples(load(path))] == ["000000", "000001"]
    assert [member[0] for member in load(path).sample(0)[1]] == ["İ".lower(), "äpng"]


@pytest.mark.parametrize("name", ["with space.txt", "a\nb.txt", " b.txt", "b.txt ", "b\t.txt", "b.x\u2028"])
def test_a_name_that_no_line_can_hold_is_indexed_in_memory(tmp_path, name):
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(raw_member(member.encode(), b"1") for member in ("a.txt", name, "c.txt")) + bytes(1024))
    found = build(path)
    assert [members[0][3] for _, members in samples(found)] == ["a.txt", name, "c.txt"]
    assert found.unsaved_bytes
    assert not (tmp_path / "a.idx").exists()


def test_a_read_only_folder_is_indexed_in_memory(shard, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(index.tempfile, "mkstemp", refuse)
    assert len(build(shard)) == 150
    assert os.listdir(shard.parent) == ["part-000.tar"]


def test_a_full_disk_is_indexed_in_memory(small_disk):
    shard = small_disk / "a.tar"
    shard.write_bytes(raw_member(b"a.txt", b"x"))
    with suppress(OSError):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    assert build(shard).unsaved_bytes
    assert sorted(os.listdir(small_disk)) == ["a.tar", "rest"]


def test_a_temporary_file_that_somebody_removes_is_no_error(shard, monkeypatch):
    """As one who makes room in a cache may."""
    replace = os.replace

    def remove_first(source, target):
        os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(index.os, "replace", remove_first)
    found = build(shard)
    assert len(found) == 150
    assert found.unsaved_bytes
    assert os.listdir(shard.parent) == ["part-000.tar"]


def test_a_file_of_another_format_is_not_overwritten(shard):
    path = shard.parent / "part-000.idx"
    path.write_bytes(b"MMIDIDX\x00\x00 Megatron's")
    assert len(build(shard)) == 150
    assert path.read_bytes().startswith(b"MMIDIDX")


def test_damage_is_kept_in_the_index(shard):
    with tarfile.open(shard) as archive:
        member = archive.getmembers()[10]
    data = bytearray(shard.read_bytes())
    data[member.offset + 5] ^= 1
    shard.write_bytes(data)
    found, again = build(shard), load(shard)
    assert found.head == again.head
    assert [damage.samples for damage in again.head.damage] == [1]
    assert len(again) == 149


GOOD = [raw_member(b"%d.%s" % (n, extension), b"x") for n in range(20) for extension in (b"jpg", b"txt")]
DAMAGED = {
    "no valid header": [*GOOD[:20], b"\x01" * 512, *GOOD[20:]],
    "the file ends inside a member": [*GOOD, header(b"x.jpg", 1000)],
    "a long name or PAX header too long to be one": [*GOOD[:20], header(b"long", 1 << 32, b"L"), *GOOD[20:]],
    "a PAX header that can't be read": [*GOOD[:20], raw_member(b"pax", b"no record", b"x"), *GOOD[20:]],
    "no end of the archive and the last sample lacks members": GOOD[:-1],
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_each_reason_for_damage_comes_back_from_the_index(tmp_path, reason):
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(DAMAGED[reason]))
    with open_shard(str(path)) as file:
        found = walk(str(path), file).damage
    assert [damage.reason for damage in found] == [reason]
    build(path)
    assert load(path).head.damage == found


def test_no_reason_for_damage_was_forgotten():
    source = inspect.getsource(tar)
    reasons = re.findall(r'(?:_BrokenError\(|_resynchronise\(|reason = )[^"\n]*"([^"]+)"', source)
    assert {*reasons} == {*DAMAGED}


# --- many shards --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return [str(write_tar(tmp_path / f"{n:02d}.tar", SAMPLES[: n + 1])) for n in range(12)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_counting_indexes_what_has_no_index(folder, jobs):
    build(folder[4])
    with Progress(disable=True) as progress:
        assert count_samples(folder, jobs, progress) == list(range(1, 13))
        assert progress.tasks[0].completed == 11
    assert all(os.path.exists(index_path(path)) for path in folder)


def test_a_shard_cut_since_it_was_indexed_is_counted_again(folder):
    count_samples(folder, 1)
    os.truncate(folder[8], 7000)
    assert 0 < count_samples(folder, 1)[8] < 9


def test_counting_reads_indexes_alone_where_there_are_any(folder, monkeypatch):
    count_samples(folder, 1)
    monkeypatch.setattr(index, "walk", lambda *_: pytest.fail("walked again"))
    assert count_samples(folder, 1) == list(range(1, 13))


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_error_of_a_bad_shard_is_its_own(folder, jobs):
    with open(folder[7], "wb") as file:
        file.write(b"<html>not found</html>" * 50)
    with pytest.raises(ShardError, match="not a tar") as caught:
        count_samples(folder, jobs)
    assert folder[7] in caught.value.where
    assert caught.value.remedy


def test_a_helper_that_dies_is_named(folder, monkeypatch):
    monkeypatch.setattr(index.sys, "executable", "/bin/true")
    with pytest.raises(MegablipError, match="was killed"):
        count_samples(folder, 3)


def test_helpers_end_with_their_parent():
    script = "from megablip.data.index import helper_main; helper_main()"
    helper = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    helper.stdin.close()
    assert helper.wait(timeout=60) == 0
