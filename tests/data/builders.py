"""Shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_tar(path: str | Path, samples: list[dict[str, bytes]]) -> Path:
    """Write samples, `{"__key__": b"...", "jpg": b"...", ...}`; without `__key__` they are numbered."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            key = sample.get("__key__", b"%06d" % number).decode()
            for extension, data in sample.items():
                if extension != "__key__":
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path
