"""What the ranks of test_loading.py do: load a model of 110 million parameters and watch their memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.slices import SliceReader, rank_file, write_slices
from megablip.config import EngineConfig, OptimizerConfig
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine

WIDTH, TOKENS, LAYERS = 2048, 32000, 11


class Large(nn.Module):
    """One parameter larger than what is read at a time, and some that are smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))


class PeakMemory:
    """Highest anonymous memory of this process while open, and the lowest before.

    Anonymous memory is what it allocated, resident: /proc/self/smaps_rollup's
    line of that name, read every 2 ms by a thread. Pages of files that were
    mapped to be read are left out: the system takes them back at will.
    """

    def __enter__(self) -> PeakMemory:
        self.before_bytes = self.peak_bytes = _anonymous_bytes()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())
            time.sleep(0.002)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


def load(topology: Topology, folder: str, strategy: str, precision: str, source: str, keep: bool) -> dict[str, Any]:
    """Build an engine and load it from an export, or from rank files; its memory in bytes.

    Args:
        source: "export", or "checkpoint": rank files that an earlier call kept.
        keep: write rank files.
    """
    ds_config = complete_ds_config(EngineConfig(ds_config=strategy, precision=precision), 1.0, 1, topology)
    slices = Path(folder) / "slices"
    with PeakMemory() as memory:
        reader = ExportReader(folder) if source == "export" else SliceReader(slices)
        engine = ZeroEngine(Large, ds_config, OptimizerConfig(lr=0.01), topology)
        engine.load(reader.read, moments=source == "checkpoint")
    held = {
        view.data_ptr(): view.numel() * view.element_size()
        for piece in engine._layout.held()
        for view in piece.tensors.values()
    }
    for parameter in engine.module.parameters():
        working = getattr(parameter, "ds_tensor", parameter)
        held[working.data_ptr()] = working.numel() * working.element_size()
    exact = True
    export = ExportReader(folder)
    for piece in engine.local_slices():
        values = export.read(piece.name, "fp32", piece.shape, piece.start, piece.end)
        exact &= torch.equal(piece.tensors["fp32"], values)
    if keep:
        slices.mkdir(exist_ok=True)
        write_slices(slices / rank_file(topology.rank), engine.local_slices(), {})
    return {"own_bytes": sum(held.values()), "peak_bytes": memory.peak_bytes - memory.before_bytes, "exact": exact}
