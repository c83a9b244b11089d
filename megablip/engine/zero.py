"""All that megablip knows of DeepSpeed's inside, in one file.

The rest of the code sees `ZeroEngine`: forward, backward, step, and the
slices of parameters and moments that this rank owns.  Names of DeepSpeed's
that are not public are used here only, each covered by a test; the supported
range of versions stands in setup.cfg.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from transformers.initialization import no_init_weights

from megablip.config import EngineConfig, OptimizerConfig, Part
from megablip.engine.optimizer import parameter_groups
from megablip.engine.topology import Topology
from megablip.errors import ConfigError
from megablip.records import MASTER, MOMENTS, LocalSlice

ReadSlice = Callable[[str, str, tuple[int, ...], int, int], torch.Tensor]
"""(parameter, kind, shape, start, end) -> fp32 vector of its flat elements [start, end)."""


def complete_ds_config(engine: EngineConfig, clip_norm: float, micro_batches: int, device_type: str) -> dict[str, Any]:
    """The DeepSpeed JSON named by the recipe, its `"auto"` values filled in.

    Raises:
        ConfigError: no such file, broken JSON, or a strategy that is not supported.
    """
    path = Path(engine.ds_config)
    if path.suffix != ".json":
        path = Path(str(files("megablip") / "ds_configs")) / f"{engine.ds_config}.json"
    try:
        ds_config = json.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(entry.name.removesuffix(".json") for entry in path.parent.glob("*.json"))
        raise ConfigError(
            "the DeepSpeed config does not exist", where=str(path), remedy=f"known names: {', '.join(known)}"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed config is no JSON: {error}", where=str(path)) from None
    sections = ("zero_optimization", "bf16")
    if not isinstance(ds_config, dict) or not all(isinstance(ds_config.get(name), dict) for name in sections):
        raise ConfigError(f"the DeepSpeed config lacks the sections {', '.join(sections)}", where=str(path))
    stage = ds_config["zero_optimization"].get("stage")
    if stage != 3:
        raise ConfigError(f"ZeRO stage {stage} is not supported yet", where=str(path), remedy="use zero3")
    automatic: dict[tuple[str, ...], Any] = {
        # Sequences are packed, so a micro-batch is one item to DeepSpeed.
        ("train_micro_batch_size_per_gpu",): 1,
        ("gradient_accumulation_steps",): micro_batches,
        ("gradient_clipping",): clip_norm,
        ("bf16", "enabled"): engine.precision == "bf16",
        ("zero_optimization", "overlap_comm"): device_type == "cuda",
    }
    for (*parents, key), value in automatic.items():
        section = ds_config[parents[0]] if parents else ds_config
        given = section.get(key, "auto")
        if given not in ("auto", value) and key != "overlap_comm":
            raise ConfigError(
                f"{'.'.join([*parents, key])} is {given}, the recipe makes it {value}",
                where=str(path),
                remedy='write "auto" there; the recipe decides',
            )
        section[key] = value if given == "auto" else given
    return ds_config


class ZeroEngine:
    """A model sharded by ZeRO, stepped by megablip's own counters.

    Args:
        build: makes the module to train, weights left uninitialised.
        ds_config: a completed DeepSpeed JSON.
        optimizer: optimizer section of the recipe.
    """

    def __init__(
        self, build: Callable[[], nn.Module], ds_config: dict[str, Any], optimizer: OptimizerConfig, topology: Topology
    ):
        with deepspeed.zero.Init(config_dict_or_path=ds_config), no_init_weights():
            module = build()
        module.train()
        named = [(name, p, tuple(p.ds_shape)) for name, p in module.named_parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            parameter_groups(named, optimizer), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw, config=ds_config, dist_init_required=False
        )
        self._zero = self._engine.optimizer
        self._rank, self._world = topology.rank, topology.world
        self.module = module
        self.micro_batches = ds_config["gradient_accumulation_steps"]
        restore_floating_buffers(module, build)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """A forward without gradient (a collective): weights, optimizer and counters stay what they are."""
        self.module.eval()
        try:
            return self._engine(*args, **kwargs)
        finally:
            self.module.train()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, averaged over ranks, undivided by the micro-batches."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[Part, float]) -> None:
        """Ends a micro-batch; after the last one of a step, clips and updates, each part with its rate."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rates[group["part"]]
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if boundary:
            # ZeRO-3 steps a parameter that gets no gradient with the one its
            # buffer still holds from an earlier step. Zeros are the truth.
            self._zero.grad_partitions_flat_buffer.zero_()

    @property
    def was_step_applied(self) -> bool:
        """False if the last step was skipped because the gradient was not finite."""
        return self._engine.was_step_applied()

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def adam_step(self) -> int:
        """Updates that the optimizer has applied (skipped steps don't count)."""
        states = self._zero.optimizer.state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def group_settings(self) -> list[dict[str, Any]]:
        """Learning rate, weight decay and so on of each parameter group."""
        return [
            {key: value for key, value in group.items() if isinstance(value, bool | int | float | str | tuple)}
            for group in self._zero.optimizer.param_groups
        ]

    def local_slices(self) -> Iterator[LocalSlice]:
        """All that this rank owns, where it lies: valid until the next step; no collective."""
        self._create_moments()
        for name, parameter, shape, start, end in self._owned():
            kinds = {MASTER: safe_get_local_fp32_param(parameter)}
            kinds |= {kind: safe_get_local_optimizer_state(parameter, kind) for kind in MOMENTS}
            # The partition of the last ranks ends in padding, which is nobody's.
            tensors = {kind: value[: end - start].detach() for kind, value in kinds.items()}
            yield LocalSlice(name, shape, start, end, tensors)

    def load(self, read: ReadSlice, *, moments: bool, adam_step: int = 0) -> None:
        """Fill the fp32 masters (and moments), then the working weights from them.

        After `initialize`, so that nothing is rounded to bf16 on the way; each
        rank reads only what it owns.

        Args:
            read: gives the flat elements of a parameter.
            moments: read the optimizer's moments too; else they are zero.
            adam_step: the optimizer's own count of updates.
        """
        self._zero.checkpoint_event_prologue()
        self._create_moments()
        for name, parameter, shape, start, end in self._owned():
            width = parameter.ds_tensor.numel()
            for kind in (MASTER, *(MOMENTS if moments else ())):
                values = torch.zeros(width)
                if end > start:
                    values[: end - start] = read(name, kind, shape, start, end)
                if kind == MASTER:
                    safe_set_local_fp32_param(parameter, values)
                    parameter.ds_tensor.data.copy_(values)
                else:
                    safe_set_local_optimizer_state(parameter, values, kind)
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(adam_step)
        self._zero.checkpoint_event_epilogue()

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each working weight, whole, on every rank, one after the other (a collective)."""
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()

    @contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """The module with all weights gathered, in eval mode: for generation (a collective)."""
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            self.module.eval()
            try:
                yield self.module
            finally:
                self.module.train()

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...], int, int]]:
        # ZeRO-3 cuts each parameter into world equal pieces, the last padded.
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                numel = math.prod(parameter.ds_shape)
                width = parameter.ds_tensor.numel()
                start = min(self._rank * width, numel)
                yield name, parameter, tuple(parameter.ds_shape), start, min(start + width, numel)

    def _create_moments(self) -> None:
        # torch's AdamW makes its state at the first step; a checkpoint of step
        # 0 and a load before it need the state to be there.
        for flat in self._zero.fp32_partitioned_groups_flat:
            if not self._zero.optimizer.state.get(flat):
                self._zero.optimizer.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    **{kind: torch.zeros_like(flat) for kind in MOMENTS},
                }


def restore_floating_buffers(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give `module` the floating buffers that a plain build has.

    zero.Init with bf16 casts every floating result of torch's factory
    functions, so the inverse frequencies of rotary embeddings come out in
    bf16, about 0.3 % off, without a warning.
    """
    with _parameters_on_meta(), no_init_weights():
        plain = dict(build().named_buffers())
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            owner_name, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner_name), leaf, plain[name].to(buffer.device))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have real buffers, and parameters without storage."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
