"""One walk over the headers of a tar: which samples it holds, and where it is damaged.

Understands ustar, GNU long names and base-256 sizes, and PAX headers with a path
or a size (POSIX.1-2024, pax, "ustar Interchange Format").  Members are grouped by
webdataset's rule; directories, links and devices are passed over, and a name is
never taken for a path.

A shard of a large set is damaged sooner or later, and that must not end a run.
Where a header should be and none is, the walk goes on at the next block that is
one; what lies between is a damaged range.  Data carry no checksum in a tar: a
change inside a member is for who decodes it to find.  Nor do long names: where one
makes keys clash among few, the samples that it tears apart are damage, too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import BinaryIO, TypeVar
from zlib import adler32

import numpy as np

from megablip.errors import ShardError

BLOCK_BYTES = 512  # a tar is made of blocks
MAX_NAME_BYTES = 1 << 20  # of a long name, or of a PAX header
MAX_MEMBERS = 1 << 23  # of a shard
MAX_DAMAGES = 1000  # damaged ranges of a shard
USUAL_SHARE = 0.9  # of the samples have the same extensions, where that says whether a sample is whole

_WINDOW_BYTES = 1 << 14  # read at a time: more would copy data that the walk passes over, less would be many calls
_SCAN_BYTES = 1 << 20

# Type flags (POSIX.1-2024, GNU tar's and Solaris' manuals). Others are members with data, but no regular files.
_REGULAR = {b"0", b"\0", b"7"}
_WITHOUT_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}  # links, devices, directories, pipes
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX_GLOBAL = b"L", b"K", b"S", b"g"
_PAX = {b"x", b"X", _PAX_GLOBAL}
_EXTENDED = {*_PAX, _LONG_NAME, _LONG_LINK, _SPARSE}  # to be read with the header after them

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

T = TypeVar("T")
Member = tuple[str, int, int, str]  # extension in lower case, offset of its data, size (bytes), name


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of a shard that can't be read, and how many samples were dropped for it."""

    offset: int  # bytes from the start of the shard
    end: int
    reason: str
    samples: int = 0

    def __str__(self) -> str:
        lost = f"; {self.samples} samples beside it dropped" if self.samples else ""
        return f"bytes {self.offset} to {self.end} are damaged: {self.reason}{lost}"


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk found: samples that are whole, in order, and damaged ranges."""

    samples: list[list[Member]]
    damage: tuple[Damage, ...]
    headers: str  # fingerprint of all headers, 16 hex digits
    size_bytes: int  # of the shard
    end: int  # offset of the end-of-archive block; size_bytes where there is none

    @property
    def has_end(self) -> bool:
        return self.end < self.size_bytes


def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, extension in lower case) of a tar member, or None for one that is no part of a sample.

    This is webdataset's rule (webdataset.tariterators: base_plus_ext, tar_file_iterator, group_by_keys):
    the key is the path up to the first dot of the base name; `__name__` members are metadata.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot > base and "\n" not in name and not name.startswith("__"):
        return name[:dot], name[dot + 1 :].lower()
    if re.match(r"__[^/]*__($|/)", name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
        return None
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)  # odd names: webdataset's own expression decides
    return (match[1], match[2].lower()) if match else None


def padded(size: int) -> int:
    """The next multiple of a block, in bytes."""
    return size + BLOCK_BYTES - 1 & -BLOCK_BYTES


def parse_header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size in bytes, type flag) of a header block; None if it is no valid one."""
    # Adler-32 begins with a plain sum of the bytes (RFC 1950), modulo 65521: a header's checksum, and 5 times
    # faster than sum(). The checksum's own field counts as 8 spaces, 256.
    if len(block) != BLOCK_BYTES:
        return None
    try:
        checksum = _octal(block[148:155])
        plain = adler32(block[156:], adler32(block[:148], 256)) & 0xFFFF
        if plain != checksum % 65521 and checksum != _signed_checksum(block):
            return None
        size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else _octal(block[124:136])
    except ValueError:
        return None
    end = block.find(0, 0, 100)
    name = block[: 100 if end < 0 else end]
    if block[345] and block[257:263] == b"ustar\0":  # GNU's own format has no prefix there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Whether a block may be the header right before the data of a member; cheap, and no checksum is made."""
    raw = name.encode("utf-8", "surrogateescape")
    if block[124:136] == b"%011o\0" % size and block.startswith(raw + b"\0") and len(block) == BLOCK_BYTES:
        return True  # as nearly all writers have it
    try:
        if len(block) != BLOCK_BYTES or (size < 1 << 33 and _octal(block[124:136]) != size):
            return False  # 11 octal digits hold no larger size
    except ValueError:
        return False
    if block.startswith(raw + b"\0"):
        return True
    if len(raw) >= 100 or not name.isascii():
        return True  # the name is in a header before this one, or in two parts
    prefix = block[345:500].split(b"\0", 1)[0]
    return bool(prefix) and raw == prefix + b"/" + block[:100].split(b"\0", 1)[0]


def _octal(field: bytes) -> int:
    """
    Raises:
        ValueError: no octal number.
    """
    digits = field[:-1]
    if field[-1] > 32 or not digits.isdigit():  # spaces around it, something after its end, or nothing at all
        digits = field.split(b"\0", 1)[0].strip() or b"0"
        if not digits.isdigit():
            raise ValueError(field)
    return int(digits, 8)


def _signed_checksum(block: bytes) -> int:
    """What some old programs wrote: the sum of the bytes as signed numbers."""
    return 256 + int(np.frombuffer(block[:148] + block[156:], np.int8).sum(dtype=np.int64))


def parse_pax(payload: bytes) -> dict[bytes, bytes] | None:
    """Records `<length> <keyword>=<value>\\n` of a PAX header; None if it is not valid.

    A path without a zero byte and a size that is a number are part of being valid.
    """
    records, start = {}, 0
    while start < len(payload):
        digits = payload[start : start + 20].split(b" ", 1)[0]
        end = start + int(digits) if digits.isdigit() else 0
        keyword, equals, value = payload[start + len(digits) + 1 : end - 1].partition(b"=")
        if not start < end <= len(payload) or payload[end - 1 : end] != b"\n" or not equals:
            return None
        records[keyword], start = value, end
    size = records.get(b"size", b"0")
    return records if b"\0" not in records.get(b"path", b"") and size.isdigit() and len(size) < 20 else None


def walk(path: str, file: BinaryIO, on_clash: Callable[[ShardError], None] | None = None) -> Walk:
    """Walk a shard.

    Args:
        on_clash: told of keys that clash, once for each way they do, and the walk goes on; None: the first is raised.

    Raises:
        ShardError: it is empty, compressed or no tar; holds no sample or sparse members; is not sorted by key;
            has two members of one extension in a sample; has too many members or damages to be a shard.
    """
    return _Walker(path, file).walk(on_clash)


class _BrokenError(Exception):
    """Where a header should be, none is; `at` is the block that isn't one."""

    def __init__(self, at: int, reason: str):
        self.at, self.reason = at, reason


class _Walker:
    """State of one walk."""

    def __init__(self, path: str, file: BinaryIO):
        self._path, self._descriptor = path, file.fileno()
        self._size = os.fstat(self._descriptor).st_size
        self._damage: list[Damage] = []
        self._fingerprint = hashlib.sha256()
        self._end = self._size

    def walk(self, on_clash: Callable[[ShardError], None] | None) -> Walk:
        if not self._size:
            raise ShardError("the shard has zero bytes", where=self._path, remedy="copy or write it again")
        keys, samples, dropped = self._group()
        keys, samples = _without(dropped, keys), _without(dropped, samples)
        if not samples:
            what = "the shard holds no sample" + (f" that is whole: {self._damage[0]}" if self._damage else "")
            raise ShardError(what, where=self._path, remedy="remove it, or check how it was written")
        if clashing := _clashing(keys, samples):
            if strays := self._drop_strays(keys, samples, clashing):
                samples = _without(strays, samples)
            else:
                for clash in self._clashes(samples, clashing):
                    if on_clash is None:
                        raise clash
                    on_clash(clash)
        return Walk(samples, tuple(self._damage), self._fingerprint.hexdigest()[:16], self._size, self._end)

    # --- members --------------------------------------------------------------

    def _members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset of its data, size in bytes) of each regular member; also of one that the file's end cuts."""
        window, start, offset = b"", 0, 0
        headers: list[bytes] = []  # hashed many at a time
        while offset < self._size:
            block = window[offset - start : offset - start + BLOCK_BYTES]
            if len(block) < BLOCK_BYTES:
                window, start = self._read(offset, _WINDOW_BYTES), offset
                block = window[:BLOCK_BYTES]
            header = parse_header(block)
            if header is None:
                if not block.strip(b"\0") and self._are_zeros(offset):
                    self._end = offset if len(block) == BLOCK_BYTES else self._size
                    break
                offset = self._resynchronise(offset, offset, "no valid header")
                continue
            headers.append(block)
            if len(headers) == 64:
                self._fingerprint.update(b"".join(headers))
                headers.clear()
            name, size, kind = header
            data = offset + BLOCK_BYTES
            if kind in _EXTENDED:
                try:
                    name, size, kind, data = self._extended(offset)
                except _BrokenError as broken:
                    offset = self._resynchronise(offset, broken.at, broken.reason)
                    continue
            if kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith("/")):  # the oldest tars' directory
                offset = data
                continue
            if kind in _REGULAR:
                yield name, data, size
            if data + size > self._size:
                offset = self._resynchronise(offset, data - BLOCK_BYTES, "the file ends inside a member")
            else:
                offset = data + padded(size)
        self._fingerprint.update(b"".join(headers))

    def _extended(self, offset: int) -> tuple[str, int, bytes, int]:
        """(name, size, type flag, offset of the data) of the member whose extended headers begin at `offset`.

        Raises:
            _BrokenError: one of them, or the member's own header, is not valid.
            ShardError: it is a sparse member.
        """
        long_name: str | None = None
        long_size: int | None = None
        while True:
            header = parse_header(block := self._read(offset, BLOCK_BYTES))
            if header is None:
                raise _BrokenError(offset, "no valid header")
            name, size, kind = header
            data = offset + BLOCK_BYTES
            if kind == _SPARSE:
                raise self._sparse(offset)
            if kind not in _EXTENDED:
                self._fingerprint.update(block)
                name, size = name if long_name is None else long_name, size if long_size is None else long_size
                return name, size, kind, data
            payload = self._read(data, size) if size <= MAX_NAME_BYTES else b""
            if len(payload) != size:
                raise _BrokenError(offset, "a long name or PAX header too long to be one")
            self._fingerprint.update(payload)
            if kind == _LONG_NAME:
                long_name = payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif kind in _PAX:
                records = parse_pax(payload)
                if records is None:
                    raise _BrokenError(offset, "a PAX header that can't be read")
                if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
                    raise self._sparse(offset)
                if kind != _PAX_GLOBAL:  # one name or size for all members that follow makes no sense
                    if b"path" in records:
                        long_name = records[b"path"].decode("utf-8", "surrogateescape")
                    if b"size" in records:
                        long_size = int(records[b"size"])
            offset = data + padded(size)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except (OSError, OverflowError) as error:
            raise ShardError(
                f"the shard can't be read: {getattr(error, 'strerror', None) or error}",
                where=f"{self._path}, offset {offset}",
                remedy="check its file system",
            ) from None

    def _sparse(self, offset: int) -> ShardError:
        where = f"{self._path}, offset {offset}"
        return ShardError("the shard has a sparse member", where=where, remedy="write the tar without --sparse")

    # --- damage ---------------------------------------------------------------

    def _are_zeros(self, offset: int) -> bool:
        """Whether the rest of the file is zeros, the end of the archive; else a header was overwritten."""
        for position in range(offset, self._size, _SCAN_BYTES):
            chunk = self._read(position, _SCAN_BYTES)
            if chunk.count(0) < len(chunk):
                return False
        return offset > 0 or self._size >= BLOCK_BYTES

    def _resynchronise(self, damaged: int, at: int, reason: str) -> int:
        """Note that the shard is damaged from `damaged` on; the offset of the first header after the block `at`.

        Each byte is searched once, as the walk goes on behind what was searched.
        """
        end = self._next_header(at + BLOCK_BYTES)
        if damaged == 0:
            self._refuse_what_is_no_tar(end)
        end = self._size if end is None else end
        self._damage.append(Damage(damaged, end, reason))
        if len(self._damage) > MAX_DAMAGES:
            raise ShardError(
                f"the shard is damaged in more than {MAX_DAMAGES} places",
                where=f"{self._path}, offset {damaged}",
                remedy="copy or write it again, or remove it",
            )
        return end

    def _next_header(self, offset: int) -> int | None:
        """Offset of the first block from `offset` on that is a header by its magic and its checksum."""
        magic = np.frombuffer(b"ustar", np.uint8)
        for position in range(offset, self._size, _SCAN_BYTES):
            chunk = self._read(position, _SCAN_BYTES)
            blocks = np.frombuffer(chunk, np.uint8, len(chunk) & -BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
            for number in np.flatnonzero((blocks[:, 257:262] == magic).all(axis=1)).tolist():
                if parse_header(blocks[number].tobytes()):
                    return position + number * BLOCK_BYTES
        return None

    def _refuse_what_is_no_tar(self, first_header: int | None) -> None:
        head = self._read(0, BLOCK_BYTES)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise ShardError(
                    f"the shard is compressed ({name}), so samples can't be read by offset",
                    where=self._path,
                    remedy="decompress it; images gain nothing from compression",
                )
        if first_header is None and parse_header(head) is None:
            raise ShardError(
                "the file is not a tar: it has no valid header",
                where=f"{self._path}, {self._size} bytes",
                remedy="check data.sources.*.shards",
            )

    # --- samples --------------------------------------------------------------

    def _group(self) -> tuple[list[str], list[list[Member]], set[int]]:
        """Runs of adjacent members of one key: keys, members, and numbers of those that are no whole sample."""
        keys: list[str] = []
        samples: list[list[Member]] = []
        firsts: list[int] = []  # for each damage, the number of the first run after it
        cut: dict[int, int] = {}  # run that the file's end cuts -> its damage
        current: str | None = None
        sample: list[Member] = []
        damage, members = self._damage, 0
        for name, offset, size in self._members():
            split = split_name(name)
            if split is None:
                continue
            key, extension = split
            if key != current or len(damage) > len(firsts):
                firsts += [len(samples)] * (len(damage) - len(firsts))
                current, sample = key, []
                keys.append(key)
                samples.append(sample)
            if offset + size > self._size:
                cut[len(samples) - 1] = len(damage)
            sample.append((extension, offset, size, name))
            members += 1
            if members > MAX_MEMBERS:
                what = f"the shard has more than {MAX_MEMBERS} members"
                raise ShardError(what, where=self._path, remedy="write smaller shards")
        firsts += [len(samples)] * (len(damage) - len(firsts))
        return keys, samples, self._drop(keys, samples, firsts, cut)

    def _drop(self, keys: list[str], samples: list[list[Member]], firsts: list[int], cut: dict[int, int]) -> set[int]:
        """Numbers of the runs that are no whole sample; what was dropped is noted in the damages.

        What a damaged range held may have belonged to the sample before it or to the one after, so one beside it
        stays only if it has the extensions that nearly all have. After it, where a name may be lost too, all go up
        to the first such one; where there is no usual set of extensions, the first one or two.
        """
        if self._end < self._size and not self._damage:
            return set()
        beside = {number for first in firsts for number in (first - 1, first)}
        if self._end == self._size:
            beside.add(len(samples) - 1)
        extensions = [_extensions(sample) for sample in samples]
        away = [names for number, names in enumerate(extensions) if number not in beside]
        usual = _most_common(away or [names for number, names in enumerate(extensions) if number not in cut])
        dropped = dict(cut)
        for damage, first in enumerate(firsts):
            if first and extensions[first - 1] != usual:
                dropped.setdefault(first - 1, damage)
            for number in range(first, len(samples)):
                if usual:
                    past_damage = extensions[number] == usual or number in dropped
                else:  # a name cut short makes a sample of one member, and the next is not whole either
                    past_damage = number > first + (len(samples[first]) == 1)
                if past_damage:
                    break
                dropped.setdefault(number, damage)
        if not self._damage and usual and extensions[-1] != usual:
            reason = "no end of the archive and the last sample lacks members"
            self._damage.append(Damage(self._size, self._size, reason))
            dropped[len(samples) - 1] = 0
        lost = {keys[number]: damage for number, damage in dropped.items()}
        counts = Counter(lost.values())
        self._damage[:] = [replace(damage, samples=counts[number]) for number, damage in enumerate(self._damage)]
        return set(dropped)

    def _drop_strays(self, keys: list[str], samples: list[list[Member]], clashing: dict[str, list[int]]) -> set[int]:
        """Numbers of the runs that a damaged long name, which has no checksum, parts or adds to; noted in the damages.

        Empty where that is not what made keys clash: they are many, or two whole samples do, or no name is long.
        As beside other damage, what is next to such a run stays only if it is whole.
        """
        pairs = zip(keys, samples, strict=True)
        usual = _most_common([_extensions(sample) for key, sample in pairs if key not in clashing])
        if usual is None or len(keys) - len(clashing) < USUAL_SHARE * len(keys):
            return set()

        def is_whole(number: int) -> bool:
            return len(samples[number]) == len(usual) and _extensions(samples[number]) == usual

        if any(sum(map(is_whole, runs)) > 1 for runs in clashing.values()):
            return set()
        parts = {number for runs in clashing.values() for number in runs if not is_whole(number)}
        beside = {number + side for number in parts for side in (-1, 1)} & set(range(len(keys)))
        strays = parts | {number for number in beside if not is_whole(number)}
        kept = set(_without(strays, keys))
        damages = []
        for _, numbered in groupby(enumerate(sorted(strays)), lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in numbered]  # of runs that follow each other
            members = [member for number in numbers for member in samples[number]]
            if not any(self._is_long(member) for member in members):
                return set()
            _, last, size, _ = members[-1]
            lost = len({keys[number] for number in numbers} - kept)
            start, end = members[0][1] - BLOCK_BYTES, last + padded(size)
            damages.append(Damage(start, end, "a name clashes with those around it", lost))
        if len(self._damage) + len(damages) > MAX_DAMAGES:
            return set()
        self._damage = sorted([*self._damage, *damages], key=lambda damage: damage.offset)
        return strays

    def _is_long(self, member: Member) -> bool:
        """Whether its name is that of an extended header, and not its own header's."""
        _, offset, _, name = member
        header = parse_header(self._read(offset - BLOCK_BYTES, BLOCK_BYTES))
        return header is None or header[0] != name

    def _clashes(self, samples: list[list[Member]], clashing: dict[str, list[int]]) -> Iterator[ShardError]:
        """One error for each way in which keys clash: the first, and how many more."""
        ways: dict[tuple[str, str], list[str]] = {}
        for key, runs in clashing.items():
            if len(runs) == 1:
                way = "key '{}' has two members of one extension", "give each sample its own key"
            elif max(Counter(extension for run in runs for extension in _extensions(samples[run])).values()) == 1:
                way = (
                    "the shard is not sorted: the members of key '{}' are not adjacent",
                    "write the tar with --sort=name",
                )
            else:
                way = "duplicate key '{}': two samples share it", "give each sample its own key"
            ways.setdefault(way, []).append(key)
        for (what, remedy), keys in ways.items():
            more = f" (and so it is with {len(keys) - 1} more keys)" if len(keys) > 1 else ""
            offset = samples[clashing[keys[0]][-1]][0][1]
            yield ShardError(what.format(keys[0]) + more, where=f"{self._path}, offset {offset}", remedy=remedy)


def _without(dropped: set[int], items: list[T]) -> list[T]:
    return [item for number, item in enumerate(items) if number not in dropped] if dropped else items


def _extensions(sample: list[Member]) -> frozenset[str]:
    return frozenset(member[0] for member in sample)


def _clashing(keys: list[str], samples: list[list[Member]]) -> dict[str, list[int]]:
    """Runs of each key that has several, or two members of one extension in one."""
    counts = Counter(keys) if len(set(keys)) < len(keys) else {}
    clashing: dict[str, list[int]] = {}
    for number, (key, sample) in enumerate(zip(keys, samples, strict=True)):
        if counts.get(key, 1) > 1 or (len(sample) > 1 and len({member[0] for member in sample}) < len(sample)):
            clashing.setdefault(key, []).append(number)
    return clashing


def _most_common(extensions: list[frozenset[str]]) -> frozenset[str] | None:
    """The extensions that at least USUAL_SHARE of the samples have."""
    for usual, count in Counter(extensions).most_common(1):
        if count >= USUAL_SHARE * len(extensions):
            return usual
    return None
