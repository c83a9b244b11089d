"""Deterministic mode, in a process of its own: it changes torch for good."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os
from megablip.engine.determinism import make_deterministic
make_deterministic()
import torch
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled(), "an operation without such a form is an error"
assert not torch.backends.cudnn.benchmark
assert not torch.utils.deterministic.fill_uninitialized_memory, "DeepSpeed's padding is never written"
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"], os.environ["NCCL_NVLS_ENABLE"])
"""


def run(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_torch_and_the_libraries_are_told():
    assert run() == ":4096:8 Ring 0"


def test_what_the_user_has_set_stays():
    assert run(NCCL_ALGO="Tree") == ":4096:8 Tree 0"
