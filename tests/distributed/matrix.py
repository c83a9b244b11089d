"""What the ranks of test_matrix.py do: one set of processes takes many strategies in turn."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.utils.groups
import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.slices import SliceReader, write_slices
from megablip.config import EngineConfig, OptimizerConfig
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.optimizer import parameter_groups
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine

OPTIMIZER = OptimizerConfig(lr=0.01, weight_decay=0.1)
RATES = {"decoder": 0.01, "sampler": 0.03, "tower": 0.02}
CLIP_NORM = 1.0
ROWS, MICRO_BATCHES = 24, 2  # of a global batch; 1 to 4 ranks divide it evenly
SAVED_AT, STEPS = 2, 5
POISONED, WITHOUT_SPARE = 2, 3  # steps: one is skipped, one does not reach `spare`


class Toy(nn.Module):
    """Sizes that no world size divides; `spare` is used on demand only."""

    def __init__(self) -> None:
        super().__init__()
        config = Phi3Config(hidden_size=32, num_attention_heads=2, pad_token_id=0)
        self.rotary = Phi3RotaryEmbedding(config)
        self.first = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.sampler = nn.Linear(11, 5, bias=False)  # a part with its own learning rate
        self.spare = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.spare.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        y = self.sampler(self.norm(torch.tanh(self.first(x))))
        y = self.tied(self.spare(y)) if use_spare else y
        y = torch.cat([y, self.frozen(y)], dim=1)
        return y.float().square().sum()


def initial(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randn(shape, generator=generator).flatten()[start:end] * 0.3


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))


def make_engine(topology: Topology, strategy: str, precision: str, build: Callable[[], nn.Module] = Toy) -> ZeroEngine:
    # A run makes one engine; DeepSpeed keeps the groups of an earlier one's hpZ.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if topology.world == 4:
        topology = replace(topology, ranks_per_node=2)  # as on two nodes
    engine = EngineConfig(ds_config=strategy, precision=precision)
    ds_config = complete_ds_config(engine, CLIP_NORM, MICRO_BATCHES, topology)
    if strategy in ("zero3", "zero3_hpz"):
        # With zero3_offload all stay whole on every rank, as small parameters do.
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return ZeroEngine(build, ds_config, OPTIMIZER, topology)


def train(engine: ZeroEngine, topology: Topology, precision: str, step: int) -> None:
    """One step on the same global batch whatever the world size."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = batch(step).to(dtype).chunk(topology.world * MICRO_BATCHES)
    for number in range(MICRO_BATCHES):
        x = parts[topology.rank * MICRO_BATCHES + number]
        loss = engine(x, use_spare=step != WITHOUT_SPARE)
        if step == POISONED and number == 0 and topology.rank == topology.world - 1:
            loss = loss * float("nan")
        elif topology.world > 1:
            loss = loss * topology.world
        engine.backward(loss)  # the forward's own output at one rank
        engine.step(RATES)


def reference() -> dict[str, Any]:
    """The same steps in fp32 without DeepSpeed: norms, and the state at the end."""
    model = Toy()
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.data.copy_(initial(name, "fp32", parameter.shape, 0, parameter.numel()).view(parameter.shape))
    named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    adamw = torch.optim.AdamW(
        parameter_groups([(n, p, tuple(p.shape)) for n, p in named.items()], OPTIMIZER),
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    norms = []
    for step in range(STEPS):
        if step == POISONED:
            norms.append(float("inf"))
            continue
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        model(batch(step), use_spare=step != WITHOUT_SPARE).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), CLIP_NORM)))
        for group in adamw.param_groups:
            group["lr"] = RATES[group["part"]]
        adamw.step()
    state = {f"{n}|{k}": adamw.state[p][k] for n, p in named.items() for k in ("exp_avg", "exp_avg_sq")}
    state |= {f"{n}|fp32": p.detach() for n, p in named.items()}
    return {"norms": norms, "state": {key: value.flatten().tolist() for key, value in state.items()}}


def whole_state(engine: ZeroEngine, topology: Topology) -> dict[str, torch.Tensor]:
    """Each whole master and moment, flat, put together from what all ranks save."""
    mine = [(s.name, s.start, s.end, s.shape, s.tensors) for s in engine.local_slices()]
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    numel = {}
    for part in topology.gather(mine):
        for name, start, end, shape, tensors in part:
            for kind, values in tensors.items():
                assert len(values) == end - start
                found.setdefault(f"{name}|{kind}", []).append((start, values))
                numel[f"{name}|{kind}"] = torch.Size(shape).numel()
    whole = {key: torch.cat([values for _, values in sorted(pieces)]) for key, pieces in found.items()}
    # Saved once each: neither a gap nor an overlap.
    assert {key: len(values) for key, values in whole.items()} == numel
    return whole


def digest(engine: ZeroEngine, topology: Topology) -> str:
    state = whole_state(engine, topology)
    return hashlib.sha256(b"".join(key.encode() + state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def save_cells(topology: Topology, folder: str, cells: list[tuple[str, str]]) -> None:
    """Train each (strategy, precision), save, train on; then die as by kill -9."""
    for strategy, precision in cells:
        engine = make_engine(topology, strategy, precision)
        engine.load(initial, moments=False)
        norms, after_skip = [], ""
        path = Path(folder) / f"{strategy}-{precision}-{topology.world}"
        for step in range(STEPS):
            if step == SAVED_AT:
                store = CheckpointStore(path, 3, topology)
                store.save(
                    step,
                    lambda path, engine=engine: write_slices(path, engine.local_slices(), {}),
                    {topology.rank: torch.arange(3).numpy()},
                    {"adam_step": engine.adam_step()},
                )
                saved = digest(engine, topology)
            train(engine, topology, precision, step)
            norms.append(engine.grad_norm)
            assert engine.was_step_applied == (step != POISONED)
            if step == POISONED:
                after_skip = digest(engine, topology)
        facts = {
            "saved": saved,
            "after_skip": after_skip,
            "after": digest(engine, topology),
            "adam_step": engine.adam_step(),
            "norms": norms,
            "state": {key: value.tolist() for key, value in whole_state(engine, topology).items()},
        }
        if topology.is_first:
            path.with_suffix(".json").write_text(json.dumps(facts))
    topology.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def load_cells(topology: Topology, folder: str, cells: list[tuple[str, str]]) -> list[str]:
    """Load every checkpoint of the folder under each (strategy, precision); what was not as it must be."""
    wrong = []
    plain = dict(Toy().named_buffers())
    for strategy, precision in cells:
        engine = make_engine(topology, strategy, precision)
        if not all(torch.equal(buffer, plain[name]) for name, buffer in engine.module.named_buffers()):
            wrong.append(f"{strategy} {precision}: buffers differ from a plain build's")
        decays = sorted((group["part"], group["weight_decay"]) for group in engine.group_settings())
        for path in sorted(Path(folder).glob(f"*-{precision}-*.json")):
            facts, cell = json.loads(path.read_text()), f"{path.stem} under {strategy} at {topology.world}"
            checkpoint = CheckpointStore(path.with_suffix(""), 3, topology).newest(print)
            reader = SliceReader(checkpoint.folder)
            adam_step = checkpoint.trainer_state["adam_step"]
            engine.load(reader.read, moments=True, adam_step=adam_step, read_frozen=initial)
            if digest(engine, topology) != facts["saved"] or engine.adam_step() != SAVED_AT:
                wrong.append(f"{cell}: not what was saved")
            for name, weight in engine.gathered():
                if name.startswith("frozen."):
                    expected = initial(name, "fp32", weight.shape, 0, weight.numel()).view(weight.shape)
                else:
                    expected = reader.whole(name)
                if not torch.equal(weight, expected.to(weight.dtype)):
                    wrong.append(f"{cell}: the working {name} is not its master, rounded")
            if path.stem == f"{strategy}-{precision}-{topology.world}":
                for step in range(SAVED_AT, STEPS):
                    train(engine, topology, precision, step)
                if digest(engine, topology) != facts["after"]:
                    wrong.append(f"{cell}: goes on in another way")
        if sorted((group["part"], group["weight_decay"]) for group in engine.group_settings()) != decays:
            wrong.append(f"{strategy} {precision}: weight decay changed")
    return wrong
