"""Modules whose weights are still to be loaded, built within the memory that they will need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.initialization import no_init_weights


def build_unfilled(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module with whole, uninitialised parameters in `dtype` on `device`, never held in another way.

    Its buffers are a plain build's, on the CPU.
    """
    with _parameters_on_meta(), no_init_weights():
        module = build()
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(owner, name, made[parameter])
    return module


def plain_buffers(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """The buffers that the module has by itself, by name."""
    with _parameters_on_meta(), no_init_weights():
        return dict(build().named_buffers())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have real buffers, and parameters without storage."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is comes from elsewhere in the module: tied
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
