"""DeepSpeed behind one interface: forward, backward, step, and this rank's slices of the state.

Strategies are files of ds_configs/ (ds_config.py says what is refused, and
why); layouts.py knows where each stage keeps weights and moments. Names of
DeepSpeed's that are not public are used in these two files and startup.py only,
each covered by a test; the supported range of versions stands in setup.cfg.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import transformers.modeling_utils  # noqa: F401 (no_init_weights needs it; under zero.Init its import would fail)
from torch import nn
from transformers.initialization import no_init_weights

from megablip.config import OptimizerConfig, Part
from megablip.engine.build import build_unfilled, plain_buffers
from megablip.engine.layouts import FlatFragments, Layout, Partitioned, Replicated
from megablip.engine.optimizer import parameter_groups
from megablip.engine.topology import Topology
from megablip.records import MASTER, MOMENTS, LocalSlice

ReadSlice = Callable[[str, str, tuple[int, ...], int, int], torch.Tensor]
"""(parameter, kind, shape, start, end) -> fp32 vector of its flat elements [start, end)."""

_READ_ELEMENTS = 1 << 24
"""A reader is asked for at most this many elements (64 MB) at a time, to bound a rank's memory."""


class ZeroEngine:
    """A model trained under a ZeRO strategy, stepped by megablip's own counters.

    Args:
        build: makes the module to train, weights left uninitialised.
        ds_config: a completed DeepSpeed JSON.
        optimizer: optimizer section of the recipe.

    Parameters of the module that need no gradient are frozen: held in working
    precision, cut up like the others under ZeRO-3, loaded, never saved.
    """

    def __init__(
        self, build: Callable[[], nn.Module], ds_config: dict[str, Any], optimizer: OptimizerConfig, topology: Topology
    ):
        self._stage = ds_config["zero_optimization"]["stage"]
        if self._stage == 3:
            module = _build_partitioned(build, ds_config)
        else:
            dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
            module = build_unfilled(build, dtype, topology.device)
        module.train()
        named = [
            (name, p, tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in module.named_parameters()
            if p.requires_grad
        ]
        adamw = torch.optim.AdamW(
            parameter_groups(named, optimizer), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        clip_norm = ds_config["gradient_clipping"]
        if self._stage == 0:
            ds_config = ds_config | {"gradient_clipping": 0.0}  # Replicated clips
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw, config=ds_config, dist_init_required=False
        )
        self.module = module
        self.micro_batches = ds_config["gradient_accumulation_steps"]
        self._layout: Layout
        if self._stage == 0:
            self._layout = Replicated(self._engine, module, topology, clip_norm)
        else:
            self._layout = (Partitioned if self._stage == 3 else FlatFragments)(self._engine, module, topology)

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
        # If `loss` itself is what the forward returned, DeepSpeed divides it by
        # the micro-batches all the same under ZeRO-0 and, in bf16, ZeRO-1.
        self._engine.backward(loss.view_as(loss), scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[Part, float]) -> None:
        """Ends a micro-batch; after the last one of a step, clips and updates, each part with its rate.

        A gradient that is not finite, on any rank, skips the update on all:
        weights, moments and `adam_step` stay as they are, bit for bit.
        """
        for group in self._layout.optimizer.param_groups:
            group["lr"] = learning_rates[group["part"]]
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary:
            self._layout.before_step()
        self._engine.step()
        if boundary:
            self._layout.after_step()

    @property
    def was_step_applied(self) -> bool:
        """False if the last step was skipped because the gradient was not finite."""
        return self._layout.was_step_applied

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping; inf if it was not finite."""
        return self._layout.grad_norm

    def adam_step(self) -> int:
        """Updates that the optimizer has applied (skipped steps don't count)."""
        return max(int(state["step"]) for state in self._layout.optimizer.state.values())

    def group_settings(self) -> list[dict[str, Any]]:
        """Learning rate, weight decay and so on of each parameter group."""
        return [
            {key: value for key, value in group.items() if isinstance(value, bool | int | float | str | tuple)}
            for group in self._layout.optimizer.param_groups
        ]

    def local_slices(self) -> Iterator[LocalSlice]:
        """All that this rank saves, where it lies: valid until the next step; no collective."""
        return self._layout.saved()

    def load(self, read: ReadSlice, *, moments: bool, adam_step: int = 0, read_frozen: ReadSlice | None = None) -> None:
        """Fill the fp32 masters (and moments), then the working weights from them.

        After `initialize`, so that nothing is rounded to bf16 on the way; each
        rank reads only what it keeps, a bounded number of elements at a time.

        Args:
            read: gives the flat elements of a parameter.
            moments: read the optimizer's moments too; else they are zero.
            adam_step: the optimizer's own count of updates.
            read_frozen: gives those of a frozen parameter; None: `read` does.
        """
        self._layout.before_load()
        for piece in self._layout.frozen():
            _fill(piece, MASTER, read_frozen or read)
        for piece in self._layout.held():
            for kind in (MASTER, *MOMENTS):
                if kind in MOMENTS and not moments:
                    piece.tensors[kind].zero_()
                else:
                    _fill(piece, kind, read)
        for state in self._layout.optimizer.state.values():
            state["step"].fill_(adam_step)
        self._layout.after_load()

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each working weight, whole, on every rank, one after the other (a collective)."""
        for name, parameter in self.module.named_parameters():
            with self._whole([parameter]):
                yield name, parameter.detach().clone()

    def _whole(self, parameters: list[nn.Parameter]) -> Any:
        return deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3)


def _fill(piece: LocalSlice, kind: str, read: ReadSlice) -> None:
    for start in range(piece.start, piece.end, _READ_ELEMENTS):
        part = piece.narrow(start, start + _READ_ELEMENTS)
        part.tensors[kind].copy_(read(piece.name, kind, piece.shape, part.start, part.end))


def _build_partitioned(build: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """The module with each parameter cut up as soon as it exists."""
    with deepspeed.zero.Init(config_dict_or_path=ds_config), no_init_weights():
        module = build()
    # zero.Init with bf16 casts every floating result of torch's factory
    # functions, so the inverse frequencies of rotary embeddings come out in
    # bf16, about 0.3 % off, without a warning.
    plain = plain_buffers(build)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            owner_name, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner_name), leaf, plain[name].to(buffer.device))
    return module
