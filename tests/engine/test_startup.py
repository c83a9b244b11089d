"""A fast start: DeepSpeed builds and compiles nothing that is not used."""

from __future__ import annotations

import subprocess
import sys


def test_deepspeed_builds_and_compiles_nothing():
    """Pins the two private names: without `spare_builds` both of these would be there."""
    script = (
        "import os, sys; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "from megablip.engine.startup import spare_builds; spare_builds()\n"
        "from deepspeed.comm.torch import build_shm_op\n"
        "from deepspeed.runtime.zero.utils import is_zero_supported_optimizer\n"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam\n"
        "from deepspeed.runtime import compiler\n"
        "import torch; assert compiler.compile() is torch.compile, 'only Muon is spared'\n"
        "assert build_shm_op() is None\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
