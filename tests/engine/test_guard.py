"""What a rank says as it ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megablip.engine import guard
from megablip.engine.guard import end_run
from megablip.errors import DeviceMemoryError

# As torch 2.11 says it.
FULL = (
    "CUDA out of memory. Tried to allocate 546.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 514.19 MiB is "
    "free. Of the allocated memory 77.73 GiB is allocated by PyTorch, and 736.86 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF."
)


def test_a_full_gpu_is_told_with_what_to_do(tmp_path, monkeypatch, capsys):
    def leave():
        raise SystemExit(1)

    told = []
    monkeypatch.setattr(guard, "_leave", leave)
    monkeypatch.setenv("RANK", "3")
    for place, where in (
        (SimpleNamespace(place="step 7", fail=told.append), "rank 3, step 7"),
        (None, "rank 3, at the start"),
    ):
        try:
            raise torch.OutOfMemoryError(FULL)
        except Exception as error:
            with pytest.raises(SystemExit):
                end_run(error, place, tmp_path)
        said = capsys.readouterr().err
        assert "Traceback" in said  # it tells forward from backward
        assert "DeviceMemoryError: CUDA out of memory. Tried to allocate 546.00 MiB." in said
        assert f"  where: {where}\n  to do: set model.activation_checkpointing=1" in said
    [error] = told
    assert isinstance(error, DeviceMemoryError)
    assert "try setting" not in str(error)
