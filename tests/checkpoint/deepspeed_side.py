"""Real DeepSpeed runs of a small model, without megablip's engine: what the readers of their files are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import nn

from megablip.engine.topology import Topology

STEPS = 3  # before the checkpoint
GROUPS = [{"lr": 1e-3, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
FAST = [
    {"name": "zero1_bf16", "stage": 1, "precision": "bf16"},
    {"name": "zero2_fp32", "stage": 2, "precision": "fp32"},
    {"name": "zero3_fp32", "stage": 3, "precision": "fp32", "sub_group_size": 60},
]
"""Cases that the fast tests share."""
BASE = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}


class LoraLinear(nn.Module):
    """A frozen matrix and what low-rank adaptation adds to it."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class Toy(nn.Module):
    """Sizes that no world divides; frozen, shared and low-rank parameters; buffers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.adapted = LoraLinear(13, 11, 3)
        self.one = nn.Parameter(torch.ones(1))  # fewer elements than ranks
        self.middle = nn.Linear(11, 5)
        self.square = nn.Linear(5, 5, bias=False)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.square.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5))
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.middle(torch.tanh(self.adapted(self.norm(self.embed(x))))) * self.one
        return (self.tied(self.square(y)) * self.scale).float().square().mean()


def write(topology: Topology, folder: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each case some steps and save it as folder/NAME/step/..., with expected.safetensors beside it."""
    return {case["name"]: _write(topology, Path(folder) / case["name"], case) for case in cases}


def ds_config(case: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"], "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    zero |= case.get("zero", {})
    if case["stage"] == 3:
        zero |= {"sub_group_size": case.get("sub_group_size", 10**9), "stage3_param_persistence_threshold": 0}
    config = BASE | {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if case["precision"] == "bf16":
        config |= {"bf16": {"enabled": True}}
        if case.get("accumulate_fp32"):
            config |= {"data_types": {"grad_accum_dtype": "fp32"}}
    return config


def engine_of(case: dict[str, Any], module: nn.Module, config: dict[str, Any]) -> Any:
    matrices = [p for n, p in module.named_parameters() if p.requires_grad and "weight" in n]
    others = [p for n, p in module.named_parameters() if p.requires_grad and "weight" not in n]
    groups = [{"params": params, **settings} for params, settings in zip((matrices, others), GROUPS, strict=True)]
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
    )
    return engine


def batch(step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def train(engine: Any, rank: int, first: int, steps: int, precision: str) -> list[float]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    losses = []
    for step in range(first, first + steps):
        loss = engine(batch(step, rank, dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments, frozen parameters and buffers, whole (a collective)."""
    found = {}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # It was done once, when the first group had stepped: the states of the others were not there yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            found[f"{name}|fp32"] = safe_get_full_fp32_param(p).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{name}|{kind}"] = safe_get_full_optimizer_state(p, kind).clone()
        else:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                found[f"{name}|frozen"] = p.detach().clone()
    found |= {f"{name}|buffer": buffer.clone() for name, buffer in engine.module.named_buffers() if name != "scratch"}
    return found


def _write(topology: Topology, folder: Path, case: dict[str, Any]) -> list[float]:
    torch.manual_seed(0)
    engine = engine_of(case, Toy(), ds_config(case))
    losses = train(engine, topology.rank, 0, STEPS, case["precision"])
    state = state_of(engine)
    engine.save_checkpoint(
        str(folder), tag="step", exclude_frozen_parameters=case.get("exclude_frozen", False), client_state={"seen": 12}
    )
    if topology.is_first:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "expected.safetensors")
    return losses
