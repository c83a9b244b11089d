"""Where each ZeRO stage keeps the fp32 masters and moments of a rank.

A layout shows them as `LocalSlice`s, one per parameter: views into
DeepSpeed's (or AdamW's) own memory, with the flat elements they are. Reading,
saving and loading then need to know nothing of stages.

    Replicated     ZeRO-0: every rank holds every parameter whole
    FlatFragments  ZeRO-1, 2: groups laid end to end, cut into equal pieces
    Partitioned    ZeRO-3, also with offload and hpZ: each parameter cut into equal pieces

Names of DeepSpeed's that are not public are used here, in zero.py and startup.py only,
each covered by tests/distributed/test_matrix.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megablip.engine.topology import Topology
from megablip.records import MASTER, MOMENTS, LocalSlice


class Layout(ABC):
    """What all stages have in common.

    Args:
        engine: DeepSpeed's, after `initialize`.
        module: the trained module.
    """

    def __init__(self, engine: Any, module: nn.Module, topology: Topology):
        self._engine, self._zero, self._topology = engine, engine.optimizer, topology
        # Whether a parameter is trained is settled here: adapters are switched off and on later.
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        for flat in self._flats():
            # torch's AdamW makes its state at the first step; a checkpoint of step
            # 0 and a load before it need the state to be there.
            if not self.optimizer.state.get(flat):
                self.optimizer.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    **{kind: torch.zeros_like(flat) for kind in MOMENTS},
                }

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside: learning rates are written into its groups."""
        return self._zero.optimizer

    @abstractmethod
    def held(self) -> Iterator[LocalSlice]:
        """All of the trained parameters that this rank keeps; what `load` fills."""

    def frozen(self) -> Iterator[LocalSlice]:
        """What this rank keeps of the frozen parameters: a MASTER in working precision and no moments."""
        for name, p in self._frozen.items():
            yield LocalSlice(name, tuple(p.shape), 0, p.numel(), {MASTER: p.data.view(-1)})

    def saved(self) -> Iterator[LocalSlice]:
        """What this rank saves: over all ranks, each element once."""
        yield from self.held()

    def before_load(self) -> None:  # noqa: B027 (a hook: most stages need nothing here)
        """Make the working weights safe to overwrite."""

    def after_load(self) -> None:
        """Bring the masters into the working weights of all ranks (a collective)."""
        self._zero.update_lp_params()

    def before_step(self) -> None:  # noqa: B027 (a hook: most stages need nothing here)
        """Called when a step's gradients are complete, before DeepSpeed's step."""

    def after_step(self) -> None:  # noqa: B027 (a hook: most stages need nothing here)
        """Called after it."""

    @property
    def was_step_applied(self) -> bool:
        return self._engine.was_step_applied()

    @property
    def grad_norm(self) -> float:
        return float(self._engine.get_global_grad_norm())

    @abstractmethod
    def _flats(self) -> list[torch.Tensor]:
        """The fp32 tensors that AdamW steps."""

    def _views(self, flat: torch.Tensor, offset: int, length: int) -> dict[str, torch.Tensor]:
        state = self.optimizer.state[flat]
        whole = {MASTER: flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
        return {kind: tensor.view(-1).narrow(0, offset, length) for kind, tensor in whole.items()}


class Replicated(Layout):
    """ZeRO-0, fp32 only: AdamW steps the weights themselves.

    DeepSpeed's own step neither skips a gradient that is not finite nor tells
    the norm here, so both are done before it. The gradients are all-reduced
    by then and the same on all ranks, so all come to the same decision.
    """

    def __init__(self, engine: Any, module: nn.Module, topology: Topology, clip_norm: float):
        super().__init__(engine, module, topology)
        self._clip_norm = clip_norm
        self._norm, self._applied = 0.0, False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._zero

    def held(self) -> Iterator[LocalSlice]:
        for name, p in self._trained.items():
            yield LocalSlice(name, tuple(p.shape), 0, p.numel(), self._views(p, 0, p.numel()))

    def saved(self) -> Iterator[LocalSlice]:
        for piece in self.held():
            width = -(-piece.end // self._topology.world)
            mine = piece.narrow(self._topology.rank * width, (self._topology.rank + 1) * width)
            if mine.end > mine.start:
                yield mine

    def after_load(self) -> None:
        pass  # the masters are the working weights

    def before_step(self) -> None:
        parameters = list(self._trained.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._norm, self._applied = float(norm), math.isfinite(norm)
        if self._applied:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        else:
            self._norm = math.inf
            for p in parameters:
                p.grad = None  # AdamW leaves alone what has no gradient

    @property
    def was_step_applied(self) -> bool:
        return self._applied

    @property
    def grad_norm(self) -> float:
        return self._norm

    def _flats(self) -> list[torch.Tensor]:
        return list(self._trained.values())


class FlatFragments(Layout):
    """ZeRO-1 and 2: DeepSpeed maps each parameter to its fragment of this rank's partition."""

    def held(self) -> Iterator[LocalSlice]:
        flats = self._flats()
        for name, p in self._trained.items():
            fragment = p._hp_mapping
            if fragment is not None:
                start = fragment.lp_fragment_address.start
                at = fragment.hp_fragment_address
                yield LocalSlice(
                    name,
                    tuple(p.shape),
                    start,
                    start + at.numel,
                    self._views(flats[fragment.param_group_index], at.start, at.numel),
                )

    def _flats(self) -> list[torch.Tensor]:
        return [group["params"][0] for group in self.optimizer.param_groups]


class Partitioned(Layout):
    """ZeRO-3: each parameter is cut into world equal pieces, the last padded.

    With the optimizer offloaded, DeepSpeed hands gradients over in a step's
    last micro-batch only: a parameter that this one does not reach loses what
    the ones before gave it. So a model must reach every parameter in every
    micro-batch, as Blip3ForConditionalGeneration does.
    """

    def held(self) -> Iterator[LocalSlice]:
        flats = self._flats()
        for name, p in self._trained.items():
            start, end = self._extent(p)
            if end > start:
                flat, offset = self._place(p, flats)
                yield LocalSlice(name, tuple(p.ds_shape), start, end, self._views(flat, offset, end - start))

    def frozen(self) -> Iterator[LocalSlice]:
        for name, p in self._frozen.items():
            start, end = self._extent(p)
            if end > start:
                yield LocalSlice(name, tuple(p.ds_shape), start, end, {MASTER: p.ds_tensor.data[: end - start]})

    def _extent(self, p: nn.Parameter) -> tuple[int, int]:
        """The flat elements [start, end) of a parameter that this rank owns."""
        numel, width = math.prod(p.ds_shape), p.ds_tensor.numel()
        start = min(self._topology.rank * width, numel)
        return start, min(start + width, numel)

    def before_load(self) -> None:
        self._zero.checkpoint_event_prologue()
        # The padding of uninitialised weights is anything, NaN too, and steps like the rest.
        for flat in self._flats():
            flat.data.zero_()

    def after_load(self) -> None:
        flats = self._flats()
        for p in self._trained.values():
            flat, offset = self._place(p, flats)
            p.ds_tensor.data.copy_(flat.data.narrow(0, offset, p.ds_tensor.numel()))
        # hpZ's copies within a node are of the weights before; DeepSpeed renews those of trained ones only.
        for p in self._frozen.values():
            p.ds_secondary_tensor = None
        self._zero.checkpoint_event_epilogue()

    def after_step(self) -> None:
        # ZeRO-3 steps a parameter that gets no gradient with the one its
        # buffer still holds from an earlier step. Zeros are the truth.
        self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._flats():
            if flat.grad is not None:  # offload keeps these from step to step
                flat.grad.zero_()

    def _place(self, p: nn.Parameter, flats: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(p)]
        return flats[group], offset

    def _flats(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat
