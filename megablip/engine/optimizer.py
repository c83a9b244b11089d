"""Parameter groups: which part of the model a parameter belongs to, and whether it decays.

megablip owns learning rates and decay.  They are written into the groups each
step, so no checkpoint and no DeepSpeed scheduler can bring back an old value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megablip.config import OptimizerConfig, Part

# Embedding tables and latents are looked up or added, not multiplied with
# activations; decaying them shrinks rare rows without a gradient to answer.
_NO_DECAY_NAMES = ("embed", "latents")
# But the convolution that embeds patches is a matrix like any other.
_DECAY_NAMES = ("patch_embedding.weight",)


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, embeddings, latents."""
    if name.endswith(_DECAY_NAMES):
        return True
    return len(shape) >= 2 and not any(word in name for word in _NO_DECAY_NAMES)


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to, by its name; what is neither tower nor sampler is decoder."""
    prefix = name.partition(".")[0]
    return {"vision_tower": "tower", "sampler": "sampler"}.get(prefix, "decoder")


def parameter_groups(
    named: Iterable[tuple[str, Any, tuple[int, ...]]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Groups of one part each, with or without weight decay; those without a parameter are left out.

    Args:
        named: (name, parameter, full shape) of each trainable parameter; the
            full shape is given apart because a partitioned parameter hides it.

    Returns:
        Groups for a torch optimizer, with the key `part` beside torch's own.
    """
    groups: dict[tuple[Part, bool], list[Any]] = {}
    for name, parameter, shape in named:
        groups.setdefault((part_of(name), decays(name, shape)), []).append(parameter)
    return [
        {"params": parameters, "part": part, "weight_decay": config.weight_decay if decay else 0.0}
        for (part, decay), parameters in groups.items()
    ]
