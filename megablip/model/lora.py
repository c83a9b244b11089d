"""LoRA: low-rank adapters beside the decoder's frozen weights (arXiv 2106.09685), by peft.

The names of a model with adapters are peft's:

    decoder.model.layers.0.mlp.down_proj.base_layer.weight       frozen; the export's ...down_proj.weight
    decoder.model.layers.0.mlp.down_proj.lora_A.default.weight   trained: [rank, in]
    decoder.model.layers.0.mlp.down_proj.lora_B.default.weight   trained: [out, rank], zero at first
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megablip.config import LoraConfig
from megablip.errors import ConfigError


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Freeze the model, put adapters into its decoder, and train those and `config.also_train`.

    Args:
        model: a Blip3ForConditionalGeneration; its weights may be on meta or partitioned.

    Raises:
        ConfigError: a target is no linear layer of the decoder's blocks.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = {name.rpartition(".")[2] for name, module in _blocks(model) if isinstance(module, nn.Linear)}
    if unknown := sorted(set(config.targets or ()) - linear):
        raise ConfigError(
            f"{', '.join(unknown)}: no linear layer of the decoder's blocks; they have {', '.join(sorted(linear))}",
            where="model.lora.targets",
            remedy="name some of these, or leave targets out to take them all",
        )
    model.requires_grad_(False)
    inject_adapter_in_model(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=sorted(config.targets or linear),
        ),
        model.decoder.base_model,
    )
    parts = {
        "sampler": model.sampler,
        "embeddings": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    for part in config.also_train:
        parts[part].requires_grad_(True)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before training, where nothing but adapters is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_name(name: str) -> str:
    """The name that a frozen weight beside an adapter has in an export."""
    return name.replace(".base_layer.", ".")


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """First values of an adapter's matrix, fp32, the same at any world size; None for any other weight.

    A as peft does it, uniform in +-1/sqrt(in), B zero, so that the model begins as its base.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    if ".lora_A." not in name:
        return None
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(shape[1] ** -0.5)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.decoder.base_model.named_modules()
