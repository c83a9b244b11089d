"""What the ranks of test_exact.py do: whole runs, one after the other in one process, which spares their start-ups."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megablip.checkpoint.slices import SliceReader
from megablip.config import load_config
from megablip.data.samples import index_sources
from megablip.engine.determinism import make_deterministic
from megablip.engine.guard import Guard
from megablip.engine.signals import StopSignal
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.launch import prepare_run
from megablip.metrics.startup import StartClock
from megablip.records import MASTER, MOMENTS
from megablip.train import run


class _Stays(Topology):
    """Goes on to the next run instead of ending the process."""

    def leave(self) -> None:
        self.barrier()


def train_in_turn(topology: Topology, recipe: str, attempts: list[list[str]]) -> list[dict[str, Any]]:
    """Each attempt is a list of overrides; of each, what was loaded and how it differs from the checkpoint."""
    make_deterministic()
    stays = _Stays(topology.rank, topology.world, topology.local_rank, topology.device)
    loads: list[dict[str, Any]] = []
    load = ZeroEngine.load

    def load_and_compare(self: ZeroEngine, read: Any, *, moments: bool, **others: Any) -> None:
        load(self, read, moments=moments, **others)
        if moments:
            loads[-1] |= {"loaded": 0, "differ": []}
        for piece in self.local_slices() if moments else ():
            for kind in (MASTER, *MOMENTS):
                stored = read(piece.name, kind, piece.shape, piece.start, piece.end)
                loads[-1]["loaded"] += piece.end - piece.start
                if not torch.equal(piece.tensors[kind], stored):
                    loads[-1]["differ"].append(f"{piece.name}|{kind}")

    ZeroEngine.load = load_and_compare
    for number, overrides in enumerate(attempts):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # what the watchers left in the store is not this run's
        loads.append({})
        config = load_config(recipe, [f"engine.ranks={topology.world}", *overrides])
        if topology.is_first:
            prepare_run(config)
            index_sources(config.data)
        topology.barrier()
        run(config, stays, Guard(config, topology), StopSignal(), StartClock())
    return loads


def different(one: Path, other: Path, step: int) -> list[str]:
    """Weights and moments that differ between two runs' checkpoints of a step, whatever their ranks."""
    readers = [SliceReader(folder / "checkpoints" / f"step_{step:08d}") for folder in (one, other)]
    assert readers[0].parameters.keys() == readers[1].parameters.keys()
    return [
        f"{name}|{kind}"
        for name in readers[0].parameters
        for kind in (MASTER, *MOMENTS)
        if not torch.equal(readers[0].whole(name, kind), readers[1].whole(name, kind))
    ]
