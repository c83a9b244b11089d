"""The states of torch's random number generators, which a resumed rank must have again."""

from __future__ import annotations

import torch


def rng_states() -> dict[str, torch.Tensor]:
    """This process's states by device type, uint8 vectors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, torch.Tensor]) -> None:
    """Set them again; a rank that the checkpoint did not have keeps its own."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
