"""Fixtures for all tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import hypothesis
import pytest

# Machines are shared and slow at times; a test that asserts a time fails for nothing.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture
def small_disk(request, tmp_path):
    """The folder of a file system of 1 MiB, or of as much as an indirect parameter says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """The model and the shards that the small real runs share."""
    from tests.distributed import runs

    folder = tmp_path_factory.mktemp("work")
    runs.make_start(folder)
    return folder


@pytest.fixture(scope="session")
def deepspeed_files(tmp_path_factory) -> Path:
    """Checkpoints that DeepSpeed saved at two ranks: a folder for each of `deepspeed_side.FAST`."""
    from tests.checkpoint.deepspeed_side import FAST
    from tests.distributed.ranks import run_ranks

    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, "tests.checkpoint.deepspeed_side:write", str(folder), FAST)
    return folder
