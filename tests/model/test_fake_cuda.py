"""The CUDA path at full size, traced where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("fake_cuda.cpp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is better (megablip doctor --gpu)")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_full_size_step_traces_on_fake_cuda_tensors(tmp_path):
    root, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", str(SOURCE), "-o", str(library),
         f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.fake_cuda", str(library)],
        cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # xGen-MM's 3,931,031,619 less the rows and biases that its key map keeps apart for three added tokens.
    assert done.stdout.splitlines()[0] == f"{3_931_031_619 - 3 * (3072 * 2 + 1)} parameters"
