"""The model and the shards that the faulty runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import runs


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    runs.make_start(folder)
    return folder
