"""What the ranks of test_zero.py do, on a small model with a rotary embedding."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.slices import SliceReader, write_slices
from megablip.config import PARTS, EngineConfig, OptimizerConfig
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine


class Toy(nn.Module):
    """Sizes that no world size divides; `spare` is used on demand only."""

    def __init__(self) -> None:
        super().__init__()
        config = Phi3Config(hidden_size=32, num_attention_heads=2, pad_token_id=0)
        self.rotary = Phi3RotaryEmbedding(config)
        self.first = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.second = nn.Linear(11, 5, bias=False)
        self.spare = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        y = self.second(self.norm(torch.tanh(self.first(x))))
        y = self.spare(y) if use_spare else y
        return y.float().square().sum()


def initial(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randn(shape, generator=generator).flatten()[start:end] * 0.3


def make_engine(topology: Topology, precision: str) -> ZeroEngine:
    ds_config = complete_ds_config(EngineConfig(precision=precision), clip_norm=1.0, micro_batches=1, topology=topology)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return ZeroEngine(Toy, ds_config, OptimizerConfig(lr=0.01, weight_decay=0.1), topology)


def train_steps(engine: ZeroEngine, precision: str, first: int, steps: int, use_spare: bool = True) -> None:
    """The same global batch whatever the world size: every rank sees all of it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for step in range(first, first + steps):
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x.to(dtype), use_spare=use_spare))
        engine.step(dict.fromkeys(PARTS, 0.01))


def digest(engine: ZeroEngine, topology: Topology) -> dict[str, list[Any]]:
    """SHA-256 of each whole master and moment, put together from all ranks."""
    parts = topology.gather(
        [(s.name, s.start, {k: t.tolist() for k, t in s.tensors.items()}) for s in engine.local_slices()]
    )
    found: dict[str, list[Any]] = {}
    for part in parts:
        for name, start, tensors in part:
            for kind, values in tensors.items():
                found.setdefault(f"{name}|{kind}", []).append((start, values))
    return {
        key: hashlib.sha256(repr([v for _, values in sorted(pieces) for v in values]).encode()).hexdigest()
        for key, pieces in found.items()
    }


def save_after(topology: Topology, folder: str, precision: str, steps: int) -> dict[str, Any]:
    engine = make_engine(topology, precision)
    engine.load(initial, moments=False)
    train_steps(engine, precision, 0, steps)
    store = CheckpointStore(Path(folder), 3, topology)
    store.save(
        steps,
        lambda path: write_slices(path, engine.local_slices(), {"cpu": torch.get_rng_state()}),
        {topology.rank: torch.arange(3).numpy()},
        {"step": steps, "adam_step": engine.adam_step()},
    )
    saved = digest(engine, topology)
    train_steps(engine, precision, steps, 3)
    return {"saved": saved, "after": digest(engine, topology)}


def load_and_go_on(topology: Topology, folder: str, precision: str) -> dict[str, Any]:
    engine = make_engine(topology, precision)
    checkpoint = CheckpointStore(Path(folder), 3, topology).newest(print)
    reader = SliceReader(checkpoint.folder)
    engine.load(reader.read, moments=True, adam_step=checkpoint.trainer_state["adam_step"])
    loaded = digest(engine, topology)
    working = {n: bool(torch.equal(w.float(), reader.whole(n).to(w.dtype).float())) for n, w in engine.gathered()}
    train_steps(engine, precision, checkpoint.step, 3)
    return {"loaded": loaded, "working": working, "after": digest(engine, topology)}


def spare_gradient(topology: Topology, precision: str) -> float:
    """exp_avg_sq of `spare` after a step that did not use it, over beta2 times the one before."""
    engine = make_engine(topology, precision)
    engine.load(initial, moments=False)

    def second_moment() -> torch.Tensor:
        return torch.cat([s.tensors["exp_avg_sq"] for s in engine.local_slices() if s.name == "spare.weight"])

    train_steps(engine, precision, 0, 1)
    before = second_moment()
    train_steps(engine, precision, 1, 1, use_spare=False)
    return float((second_moment() - 0.95 * before).abs().max())


def buffers(topology: Topology, precision: str) -> dict[str, bool]:
    plain = dict(Toy().named_buffers())
    return {n: bool(torch.equal(b, plain[n])) for n, b in make_engine(topology, precision).module.named_buffers()}
