"""Parameter groups and the learning rate: pure functions of the recipe.

megablip owns both.  They are written into the optimizer each step, so no
checkpoint and no DeepSpeed scheduler can bring back an old value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megablip.config import Duration, OptimizerConfig

# Embedding tables and latents are looked up or added, not multiplied with
# activations; decaying them shrinks rare rows without a gradient to answer.
_NO_DECAY_NAMES = ("embed", "latents")


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, embeddings, latents."""
    return len(shape) >= 2 and not any(word in name for word in _NO_DECAY_NAMES)


def parameter_groups(
    named: Iterable[tuple[str, Any, tuple[int, ...]]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay.

    Args:
        named: (name, parameter, full shape) of each trainable parameter; the
            full shape is given apart because a partitioned parameter hides it.
    """
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter, shape in named:
        groups[decays(name, shape)].append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0}
        for decay, parameters in groups.items()
        if parameters
    ]


def learning_rate(config: OptimizerConfig, duration: Duration, *, step: int, tokens: int, epochs: float = 0.0) -> float:
    """Linear warmup times cosine from `lr` to `lr * min_lr_ratio`.

    Args:
        step: steps done before this one.
        tokens: tokens trained before this step.
        epochs: epochs of the data trained before this step.

    Source of the shape: Loshchilov & Hutter, "SGDR" (arXiv 1608.03983), without restarts.
    """
    # The first step has done nothing yet; without the + 1 it would be wasted at lr 0.
    warmup = config.warmup.done(steps=step + 1, tokens=tokens + 1) if config.warmup.value else 1.0
    progress = min(1.0, duration.done(steps=step, tokens=tokens, epochs=epochs))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * min(1.0, warmup) * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)
