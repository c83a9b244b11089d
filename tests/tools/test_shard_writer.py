"""Shards that are written as a whole, or not at all."""

import os
from collections import Counter
from pathlib import Path

import pytest

from megablip.errors import ConfigError
from tools.shard_writer import write_counted


def broken():
    yield {"__key__": "a", "txt": "b"}
    raise ConfigError("a broken sample")


@pytest.mark.parametrize(("samples", "reason"), [(iter(()), "no sample to write"), (broken(), "a broken sample")])
def test_after_an_error_there_is_no_folder_and_no_open_file(tmp_path, samples, reason):
    """A stream that was left open once told of itself when Python came to it."""
    with pytest.raises(ConfigError, match=reason) as error:
        write_counted(tmp_path / "out", samples, Counter())
    assert not (tmp_path / "out").exists()
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [path for path in opened if path.startswith(str(tmp_path))] == [], error.traceback
