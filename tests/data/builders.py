"""Shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_tar(path: str | Path, samples: list[dict[str, bytes]], tar_format: int = tarfile.DEFAULT_FORMAT) -> Path:
    """Write samples, `{"__key__": b"...", "jpg": b"...", ...}`; without `__key__` they are numbered."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, sample in enumerate(samples):
            key = sample.get("__key__", b"%06d" % number).decode()
            for extension, data in sample.items():
                if extension != "__key__":
                    add_member(tar, f"{key}.{extension}", data)
    return path


def add_member(tar: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
    """Add a member; one that is no regular file has no data."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data) if kind == tarfile.REGTYPE else 0
    member.linkname = "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    tar.addfile(member, io.BytesIO(data))


def header(name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A header block, of any content, whose checksum fits; `size` as a number or as its field of 12 bytes."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
    block = (block + bytes(100) + magic).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def raw_member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    """A member as its bytes: header, data, padding."""
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)
