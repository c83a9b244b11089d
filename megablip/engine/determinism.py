"""Deterministic mode: the same world size, recipe, hardware and versions give the same bits."""

from __future__ import annotations

import os

_ENVIRONMENT = {
    # cuBLAS picks algorithms by the free workspace otherwise (NVIDIA, cuBLAS, "Results reproducibility").
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # One algorithm, so that sums over ranks always run in the same order.
    "NCCL_ALGO": "Ring",
    # The switch's own sums (NVLink SHARP) have no fixed order.
    "NCCL_NVLS_ENABLE": "0",
}


def make_deterministic() -> None:
    """Before the device is first used, and before the ranks meet.

    An operation that has no deterministic form raises torch's own error, which
    names it.  Attention looks at torch's flag by itself.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling new memory with NaN finds reads before a write, but DeepSpeed's
    # padding is never written, and its norms would be NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False
