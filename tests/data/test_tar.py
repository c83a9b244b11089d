import bz2
import gzip
import lzma
import re
import struct
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from megablip.data import tar
from megablip.data.tar import parse_header, parse_pax, split_name, walk
from megablip.errors import ShardError
from tests.data.builders import add_member, header, raw_member, write_tar

LONG_NAME = "folder/" + "n" * 150
END = bytes(1024)
GOOD = raw_member(b"good.txt", b"good")


@pytest.fixture
def shard(tmp_path):
    samples = [{"jpg": b"%04d" % n * (150 * n % 700), "txt": b"text %d" % n, "json": b"{}"} for n in range(20)]
    return write_tar(tmp_path / "part-000.tar", samples)


def walk_file(path):
    with open(path, "rb") as file:
        return walk(str(path), file)


def walk_bytes(tmp_path, content):
    path = tmp_path / "some.tar"
    path.write_bytes(content)
    return walk_file(path)


def names(found):
    return [[name for _, _, _, name in sample] for sample in found.samples]


def contents(path, found):
    """{key: {extension: bytes}} by the offsets of a walk."""
    data = path.read_bytes()
    return {
        split_name(sample[0][3])[0]: {ext: data[offset : offset + size] for ext, offset, size, _ in sample}
        for sample in found.samples
    }


def by_webdataset(path):
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return {s["__key__"]: {ext: data for ext, data in s.items() if not ext.startswith("__")} for s in dataset}


# --- what there is ------------------------------------------------------------


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_finds_what_webdataset_reads(tmp_path, tar_format):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tar_format) as archive:
        add_member(archive, "folder", kind=tarfile.DIRTYPE)
        add_member(archive, "__meta__", b"skipped")
        add_member(archive, "__index__/a.txt", b"skipped")
        add_member(archive, "folder/a.jpg", b"1" * 700)
        add_member(archive, "no_extension", b"skipped")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            add_member(archive, "folder/link.jpg", kind=kind)
        add_member(archive, "folder/a.seg.PNG", b"")
        add_member(archive, "v1.2/b.c/d.tar.gz", b"dots")
        add_member(archive, "b.txt", "ä".encode())
        add_member(archive, "p" * 100 + "/" + "q" * 90 + ".txt", b"name in two parts")
        add_member(archive, "r" * 96 + ".txt", b"a name of 100 bytes")
        if tar_format != tarfile.USTAR_FORMAT:
            add_member(archive, LONG_NAME + ".txt", b"longer")
            add_member(archive, LONG_NAME + ".json", b"{}")
            add_member(archive, "ü with space.txt", b"no text line can hold this name")
            add_member(archive, "x" * 5000 + ".txt", b"a very long name")
            member = tarfile.TarInfo("link" * 50)
            member.type, member.linkname = tarfile.SYMTYPE, "target" * 50
            archive.addfile(member)
        add_member(archive, "../../etc/passwd.txt", b"a name only, never a path")
        add_member(archive, "/absolute.txt", b"this too")
        add_member(archive, "./dot.txt", b"and this")
    found = walk_file(path)
    assert contents(path, found) == by_webdataset(path)
    assert len(found.samples) >= 7
    assert found.damage == ()
    assert found.has_end


@given(st.text(alphabet="ab./_\n A", max_size=12) | st.text(max_size=8))
def test_keys_are_those_of_webdataset(name):
    key, extension = base_plus_ext(name)
    is_meta = ("/" not in name and name.startswith("__") and name.endswith("__")) or re.match(r"__[^/]*__($|/)", name)
    assert split_name(name) == (None if key is None or is_meta else (key, extension.lower()))


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=120))
def test_names_and_sizes_are_those_of_tarfile(name):
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        member = tarfile.TarInfo(name)
        member.size = len(name)
        try:
            block = member.tobuf(tar_format)[-512:]
        except ValueError:  # ustar can't hold it
            continue
        expected = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        assert parse_header(block) == (expected.name, len(name), b"0")
        assert parse_header(block[:7] + bytes([block[7] ^ 16]) + block[8:]) is None


def test_sizes_in_base_256_and_in_a_pax_header(tmp_path):
    big = (1 << 33) + 5
    block = header(b"big.bin", b"\x80" + big.to_bytes(11, "big"))
    assert parse_header(block) == ("big.bin", big, b"0")
    assert parse_header(header(b"big.bin", b"\xff" * 12)) is None
    assert parse_header(header(b"twelve.bin", b"111111111111")) == ("twelve.bin", 0o111111111111, b"0")
    path = tmp_path / "sparse_file.tar"  # a file with a hole, not a sparse member
    with open(path, "wb") as file:
        file.write(raw_member(b"PaxHeader", b"19 size=8589934597\n", b"x") + header(b"big.bin", 0))
        file.seek(tar.padded(file.tell() + big))
        file.write(GOOD + END)
    found = walk_file(path)
    assert [[member[2] for member in sample] for sample in found.samples] == [[big], [4]]
    assert found.damage == ()


def test_headers_with_signed_checksums_and_of_the_oldest_format(tmp_path):
    block = bytearray(header("grün.txt".encode(), 4))
    signed = 256 + sum(struct.unpack("148b", block[:148])) + sum(struct.unpack("356b", block[156:]))
    block[148:156] = b"%06o\0 " % signed
    oldest = header(b"old.txt", 3, kind=b"\0", magic=b"") + b"old".ljust(512, b"\0")
    folder = header(b"folder.d/", 0, kind=b"\0", magic=b"")
    found = walk_bytes(tmp_path, bytes(block) + b"data".ljust(512, b"\0") + folder + oldest + END)
    assert names(found) == [["grün.txt"], ["old.txt"]]
    assert found.damage == ()


@pytest.mark.parametrize(
    ("payload", "records"),
    [
        (b"11 path=ab\n", {b"path": b"ab"}),
        (b"11 path=ab\n13 comment=x\n", {b"path": b"ab", b"comment": b"x"}),
        (b"12 path=a\nb\n", {b"path": b"a\nb"}),
        (b"", {}),
        (b"99 path=ab\n", None),
        (b"0 path=ab\n", None),
        (b"path=ab\n", None),
        (b"-5 path=ab\n", None),
        (b"8 path\n\n", None),
        (b"11 path=a\0\n", None),
        (b"11 size=-1\n", None),
        (b"30 size=" + b"9" * 21 + b"\n", None),
        (b"9" * 5000 + b" path=ab\n", None),
    ],
)
def test_pax_records(payload, records):
    assert parse_pax(payload) == records


def test_the_fingerprint_is_of_headers_alone_and_of_all(tmp_path):
    one = [raw_member(b"a.txt", b"one"), raw_member(b"b.txt", b"two"), raw_member(b"c.txt", b"six")]
    fingerprint = walk_bytes(tmp_path, b"".join(one) + END).headers
    assert walk_bytes(tmp_path, b"".join(one).replace(b"six", b"ten") + END).headers == fingerprint
    assert walk_bytes(tmp_path, b"".join(one).replace(b"0000644", b"0000446") + END).headers != fingerprint
    long_names = [raw_member(b"long", b"%s.txt" % letter, b"L") + one[0] + END for letter in (b"y", b"z")]
    assert len({walk_bytes(tmp_path, content).headers for content in long_names}) == 2


# --- damage -------------------------------------------------------------------


def ranges_of_samples(path):
    """{key: (start, end)}, headers included, by tarfile."""
    with tarfile.open(path) as archive:
        ends: dict[str, list[int]] = {}
        for member in archive:
            key = split_name(member.name)[0]
            ends.setdefault(key, []).extend([member.offset, member.offset_data + member.size])
    return {key: (min(offsets), max(offsets)) for key, offsets in ends.items()}


def check_damaged(tmp_path, whole, data, position):
    """All samples but the one with the changed byte arrive; a range says which is lost."""
    expected, ranges = contents(whole, walk_file(whole)), ranges_of_samples(whole)
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    found = walk_file(path)
    arrived = contents(path, found)
    lost = expected.keys() - arrived.keys()
    assert not arrived.keys() - expected.keys()
    for key in lost:  # only where damage is, and where it is said
        start, end = ranges[key]
        assert any(start <= damage.end and damage.offset <= end for damage in found.damage), key
        assert start <= position < end
    for key, members in arrived.items():
        assert members.keys() == expected[key].keys()
        assert members == expected[key] or ranges[key][0] <= position < ranges[key][1]
    assert sum(damage.samples for damage in found.damage) == len(lost)
    return found, lost


@pytest.mark.parametrize("seed", range(50))
def test_a_truncated_shard_gives_the_samples_before_the_cut(tmp_path, shard, seed):
    data, ranges = shard.read_bytes(), ranges_of_samples(shard)
    last = max(end for _, end in ranges.values())
    cut = int(np.random.default_rng(seed).integers(2000, last))
    found = walk_bytes(tmp_path, data[:cut])
    whole = contents(shard, walk_file(shard))
    assert contents(tmp_path / "some.tar", found) == {key: whole[key] for key, (_, end) in ranges.items() if end <= cut}
    begun = [key for key, (start, end) in ranges.items() if start < cut < end]
    assert sum(damage.samples for damage in found.damage) == sum(ranges[key][0] + 512 <= cut for key in begun)
    assert [damage.end for damage in found.damage] == [cut] * len(begun)
    assert not found.has_end


@pytest.mark.parametrize("seed", range(200))
def test_flipped_bits(tmp_path, shard, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        headers = [member.offset for member in archive]
    in_header = seed % 2
    if in_header:
        position = int(rng.choice(headers)) + int(rng.choice([*range(148), *range(148, 154), *range(156, 512)]))
    else:
        position = int(rng.integers(headers[-1]))
    data[position] ^= 1 << int(rng.integers(8))
    found, lost = check_damaged(tmp_path, shard, bytes(data), position)
    hit = [offset for offset in headers if offset <= position < offset + 512 and not 154 <= position - offset < 156]
    assert [damage.offset for damage in found.damage] == hit
    assert len(lost) == len(hit)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("members", [("jpg", "txt"), ("0.jpg", "1.jpg", "json", "txt")])
def test_flipped_bits_of_long_names(tmp_path, tar_format, members):
    """They have no checksum: a member may seem another sample's, or its sample be cut in two."""
    key_of = LONG_NAME + "{:03d}"
    samples = [{"__key__": key_of.format(n).encode(), **dict.fromkeys(members, b"%d" % n)} for n in range(40)]
    shard = write_tar(tmp_path / "a.tar", samples, tar_format)
    whole, data = contents(shard, walk_file(shard)), shard.read_bytes()
    with tarfile.open(shard) as archive:
        payloads = [(split_name(member.name)[0], member.offset + 512) for member in archive]
    rng, clashes = np.random.default_rng(0), 0
    for _ in range(300):
        key, offset = payloads[rng.integers(len(payloads))]
        name = data.index(key.encode(), offset)
        places = np.arange(offset, name + len(key) + 5), name + len(key) - 1 - np.arange(3)
        damaged = bytearray(data)
        damaged[rng.choice(places[rng.integers(2)])] ^= 1 << int(rng.integers(8))  # by half in what tells keys apart
        found = walk_bytes(tmp_path, bytes(damaged))
        arrived = contents(tmp_path / "some.tar", found)
        lost = {other for other in whole if other != key and arrived.get(other) != whole[other]}
        clashes += bool(found.damage)
        assert len(lost) <= 1
        assert not lost & arrived.keys()
        assert sum(damage.samples for damage in found.damage) >= len(lost)
        assert all(len({*sample.values()}) == 1 for sample in arrived.values())  # none has a member of another
        assert not found.damage or all(sample.keys() == {*members} for sample in arrived.values())
    assert clashes > 30


@pytest.mark.parametrize("seed", range(30))
def test_many_places_at_once(tmp_path, shard, seed):
    """Zeros, noise or parts of other headers over several ranges."""
    rng = np.random.default_rng(seed)
    data = bytearray(shard.read_bytes())
    changed = set()
    for _ in range(rng.integers(1, 5)):
        start, length = int(rng.integers(512, len(data) - 10240)), int(rng.integers(1, 3000))
        noise = bytes(length) if rng.random() < 0.5 else rng.bytes(length)
        data[start : start + length] = noise
        changed.update(range(start, start + length))
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    try:
        found = walk_file(path)
    except ShardError:
        return  # nothing is left
    ranges, expected, arrived = ranges_of_samples(shard), contents(shard, walk_file(shard)), contents(path, found)
    for key, (start, end) in ranges.items():
        untouched = not changed & set(range(start, end))
        assert not untouched or arrived[key] == expected[key]
    assert all(arrived[key].keys() == expected[key].keys() for key in arrived)


def test_damage_beside_samples_that_all_differ_takes_both_neighbours(tmp_path):
    """Whether the lost member was the one's or the other's can't be known."""
    samples = [{f"{n}.jpg": b"x" for n in range(number + 1)} for number in range(6)]
    path = write_tar(tmp_path / "a.tar", samples)
    with tarfile.open(path) as archive:
        offset = next(member.offset for member in archive if member.name == "000003.0.jpg")
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    found = walk_bytes(tmp_path, bytes(data))
    assert [split_name(sample[0])[0] for sample in names(found)] == ["000000", "000001", "000004", "000005"]
    assert [damage.samples for damage in found.damage] == [2]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_broken_header_before_a_long_name(tmp_path, tar_format):
    """The header after it is valid, but its name is cut short: such a sample must not pass for another."""
    samples = [{"__key__": b"%s/%06d" % (LONG_NAME.encode(), n), "jpg": b"j", "txt": b"t"} for n in range(8)]
    path = write_tar(tmp_path / "a.tar", samples, tar_format)
    whole = contents(path, walk_file(path))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        members = list(archive)
    for member in members:
        damaged = bytearray(data)
        damaged[member.offset + 2] ^= 1
        found = walk_bytes(tmp_path, bytes(damaged))
        arrived = contents(tmp_path / "some.tar", found)
        assert arrived == {key: whole[key] for key in whole if key != split_name(member.name)[0]}
        assert len(found.damage) == 1


def test_a_broken_header_before_a_long_name_among_samples_that_all_differ(tmp_path):
    """The name cut short looks like another sample's; what comes after it is neither a sample nor a duplicate."""
    samples = [
        {"__key__": b"folder/v1.%s/%06d" % (b"n" * 150, n), **{f"{i}.jpg": b"j" for i in range(n % 4 + 2)}}
        for n in range(8)
    ]
    path = write_tar(tmp_path / "a.tar", samples, tarfile.GNU_FORMAT)
    whole = contents(path, walk_file(path))
    with tarfile.open(path) as archive:
        members = list(archive)
    for member in members:
        damaged = bytearray(path.read_bytes())
        damaged[member.offset + 2] ^= 1
        arrived = contents(tmp_path / "some.tar", walk_bytes(tmp_path, bytes(damaged)))
        assert all(members == whole[key] for key, members in arrived.items())
        assert split_name(member.name)[0] not in arrived
        assert len(arrived) >= len(whole) - 3


def test_two_archives_in_one_file(tmp_path):
    found = walk_bytes(tmp_path, GOOD + END + raw_member(b"later.txt", b"later") + END)
    assert names(found) == [["good.txt"], ["later.txt"]]
    assert [(damage.offset, damage.end, damage.samples) for damage in found.damage] == [(1024, 2048, 0)]


@pytest.mark.parametrize(("padding", "has_end"), [(0, False), (100, False), (512, True), (1024, True), (9 * 512, True)])
def test_a_missing_end_is_no_damage(tmp_path, padding, has_end):
    found = walk_bytes(tmp_path, GOOD + bytes(padding))
    assert (names(found), found.damage, found.has_end) == ([["good.txt"]], (), has_end)


def test_without_an_end_the_last_sample_must_look_like_the_others(tmp_path):
    samples = [{"jpg": b"j", "txt": b"t"}] * 5
    data = write_tar(tmp_path / "a.tar", samples).read_bytes()
    found = walk_bytes(tmp_path, data[: 9 * 1024])  # cut between the last sample's members
    assert len(found.samples) == 4
    assert [(damage.offset, damage.samples) for damage in found.damage] == [(9 * 1024, 1)]


# --- what is no shard, and what is hostile ------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zero bytes"),
        (gzip.compress(GOOD, mtime=0), r"compressed \(gzip\)"),
        (bz2.compress(GOOD), r"compressed \(bzip2\)"),
        (lzma.compress(GOOD), r"compressed \(xz\)"),
        (b"\x28\xb5\x2f\xfd rest", r"compressed \(zstd\)"),
        (b"\x04\x22\x4d\x18 rest", r"compressed \(lz4\)"),
        (b"<html>not found</html>" * 50, "not a tar"),
        (b"PK\x03\x04" + bytes(3000), "not a tar"),
        (bytes(100), "not a tar"),
        (GOOD[:300], "not a tar"),
        (bytes(10240), "no sample"),
        (raw_member(b"README", b"text") + END, "no sample"),
        (header(b"a.txt", 1000), "no sample that is whole"),
        (header(b"a.txt", 5, b"S") + END, "sparse"),
        (raw_member(b"x", b"22 GNU.sparse.major=1\n", b"x") + GOOD, "sparse"),
    ],
)
def test_what_is_no_shard(tmp_path, content, message):
    with pytest.raises(ShardError, match=message) as caught:
        walk_bytes(tmp_path, content)
    assert str(tmp_path) in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.txt", "b.txt", "a.jpg"], "members of key 'a' are not adjacent.*sort=name"),
        (
            ["a.txt", "b.txt", "c.txt", "a.jpg", "b.jpg", "c.jpg"],
            r"'a' are not adjacent \(and so it is with 2 more keys",
        ),
        (["a.txt", "a.jpg", "b.txt", "b.jpg", "a.txt"], "duplicate key 'a': two samples share it.*its own key"),
        (["a.txt", "b.txt", "b.txt"], "two members of one extension"),
        (["a.jpg", "a.JPG"], "two members of one extension"),
    ],
)
def test_keys_that_clash(tmp_path, members, message):
    with pytest.raises(ShardError, match="(?s)" + message) as caught:
        walk_bytes(tmp_path, b"".join(raw_member(name.encode(), b"x") for name in members) + END)
    assert "offset" in caught.value.where


def test_keys_that_clash_in_several_ways_are_all_told(tmp_path):
    path, told = tmp_path / "a.tar", []
    path.write_bytes(
        b"".join(raw_member(name, b"x") for name in (b"a.t", b"b.t", b"b.t", b"a.j", b"c.t", b"a.j")) + END
    )
    with open(path, "rb") as file:
        found = walk(str(path), file, told.append)
    assert [error.what.split("key")[0] for error in told] == ["duplicate ", ""]
    assert names(found) == [["a.t"], ["b.t", "b.t"], ["a.j"], ["c.t"], ["a.j"]]


@pytest.mark.parametrize("count", [2, 20])
def test_what_a_changed_bit_can_not_make_is_told(tmp_path, count):
    """Names with a checksum, or a whole sample twice, among many that are in order."""
    rows = [raw_member(b"%03d.%s" % (n, kind), b"x") for n in range(30) for kind in (b"jpg", b"txt")]
    with pytest.raises(ShardError, match="'007' are not adjacent"):
        walk_bytes(tmp_path, b"".join([*rows[:15], *rows[16:30], rows[15], *rows[30:]]) + END)
    samples = [{"__key__": LONG_NAME.encode() + b"%03d" % n, "jpg": b"j", "txt": b"t"} for n in [*range(count), 0]]
    torn = [
        {"__key__": LONG_NAME.encode() + key, kind: b"x"} for key, kind in ((b"x", "jpg"), (b"y", ""), (b"x", "txt"))
    ]
    for content in (samples, samples + torn):
        with pytest.raises(ShardError, match="duplicate key"):
            walk_file(write_tar(tmp_path / "twice.tar", content))


PAX = [
    raw_member(b"pax", payload, b"x") for payload in (b"no record", b"20 path=short\n", b"11 size=-1\n", b"\xff" * 600)
]
HOSTILE = {
    "a size beyond the file": header(b"bad.txt", 1 << 30),
    "the largest octal size": header(b"bad.txt", b"77777777777\0"),
    "the largest base-256 size": header(b"bad.txt", b"\x80" + b"\xff" * 11),
    "a negative base-256 size": header(b"bad.txt", b"\xff" * 12),
    "a negative octal size": header(b"bad.txt", b"-0000000001\0"),
    "a size in words": header(b"bad.txt", b"one hundred\0"),
    "an underscore in a size": header(b"bad.txt", b"0000000_001\0"),
    "digits of another script": header(b"bad.txt", "٣٣٣٣٣٣".encode()),
    "a folder's name with a size beyond the file": header(b"bad.txt", 1 << 30, b"A"),
    "a huge long name": header(b"bad.txt", 1 << 32, b"L"),
    "a huge long link": header(b"bad.txt", 1 << 32, b"K"),
    "a huge PAX header": header(b"bad.txt", 1 << 32, b"x"),
    "a huge global PAX header": header(b"bad.txt", (1 << 33) - 1, b"g"),
    "a long name of two megabytes": raw_member(b"long", b"n" * (2 << 20), b"L"),
    "a long name before nothing": raw_member(b"long", b"name", b"L") + b"\x01" * 512,
    "a long name before zeros": raw_member(b"long", b"name", b"L") + bytes(512),
    "a PAX size beyond the file": raw_member(b"pax", b"19 size=8589934597\n", b"x") + header(b"bad.txt", 0),
    "a PAX path with a zero": raw_member(b"pax", b"14 path=a\0.tx\n", b"x"),
    "noise": np.random.default_rng(0).bytes(5000).ljust(5120, b"!"),
    "a block of ustar": (b"ustar" * 103)[:512],
    "many magics": (bytes(257) + b"ustar\x0000" + bytes(247)) * 3000,
    "a compressed member's start": b"\x1f\x8b" + bytes(510),
    "a wrong checksum": GOOD[:148] + b"0000001\0" + GOOD[156:],
    "no checksum": GOOD[:148] + bytes(8) + GOOD[156:],
    **{f"PAX {number}": content for number, content in enumerate(PAX)},
}
HARMLESS = {
    "an absolute name": raw_member(b"/etc/passwd", b"x"),
    "a name with ..": raw_member(b"../../../etc/cron", b"x"),
    "a link to /etc": header(b"link.txt", 0, b"2"),
    "a hard link with a size": header(b"hard.txt", 4096, b"1"),
    "a device": header(b"dev.txt", 4096, b"3"),
    "an unknown kind": raw_member(b"what.txt", b"x" * 600, b"V"),
    "a global PAX path": raw_member(b"pax", b"16 path=all.txt\n", b"g"),
    "no name": raw_member(b"", b"x"),
    "a chain of a thousand long names": raw_member(b"long", b"name", b"L") * 1000 + raw_member(b"short", b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_damage_and_cost_no_other_sample(tmp_path, name):
    before, after = (b"".join(raw_member(b"%d.txt" % n, b"%d" % n) for n in range(*r)) for r in ((0, 5), (5, 10)))
    found = walk_bytes(tmp_path, before + HOSTILE[name] + after + END)
    assert names(found) == [[f"{n}.txt"] for n in range(10)]
    assert [damage.offset for damage in found.damage][:1] == [len(before)]


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_members_are_passed_over(tmp_path, name):
    found = walk_bytes(tmp_path, GOOD + HARMLESS[name] + raw_member(b"later.txt", b"x") + END)
    assert names(found) == [["good.txt"], ["later.txt"]]
    assert found.damage == ()


def test_a_shard_that_is_mostly_damage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_DAMAGES", 20)
    with pytest.raises(ShardError, match="in more than 20 places"):
        walk_bytes(tmp_path, b"".join(raw_member(b"%d.txt" % n, b"x") + b"!" * 512 for n in range(30)))


def test_a_shard_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBERS", 20)
    with pytest.raises(ShardError, match="more than 20 members"):
        walk_bytes(tmp_path, b"".join(raw_member(b"%d.txt" % n, b"x") for n in range(30)))


def test_headers_with_random_bytes_and_a_checksum_that_fits(tmp_path):
    """Samples or a ShardError, nothing else, and in finite time."""
    good = write_tar(tmp_path / "good.tar", [{"txt": b"x" * 30}] * 4).read_bytes()
    numbers = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        start = 1024 * int(numbers.integers(4))
        for _ in range(3):
            data[start + int(numbers.integers(100, 512))] = int(numbers.integers(256))
        block = data[start : start + 512]
        block[148:156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        with suppress(ShardError):
            walk_bytes(tmp_path, data)
