"""From patch features to visual tokens: the sampler and its variants.

A variant is a subclass of `Sampler` in a file of its own and a line in SAMPLERS.
The model config names one, with its settings: `sampler: {kind: fixed, num_latents: 256}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.initialization import no_init_weights

from megablip.errors import CheckpointError, ConfigError
from megablip.model.samplers.base import Sampler, SamplerFlops, VisualTokens
from megablip.model.samplers.fixed import FixedResampler
from megablip.model.samplers.instruct import InstructResampler
from megablip.model.samplers.instruction import Instruction, find_instructions
from megablip.model.samplers.mlp import MLPSampler
from megablip.model.samplers.perceiver import PerceiverResampler, regroup_released
from megablip.model.samplers.qformer import QFormerSampler

if TYPE_CHECKING:
    from megablip.model.blip3 import Blip3Config

__all__ = [
    "SAMPLERS",
    "Instruction",
    "PerceiverResampler",
    "Sampler",
    "SamplerFlops",
    "VisualTokens",
    "build_sampler",
    "complete_settings",
    "find_instructions",
    "foreign_weights",
    "regroup_released",
    "sampler_class",
]

SAMPLERS: dict[str, type[Sampler]] = {
    "perceiver": PerceiverResampler,
    "fixed": FixedResampler,
    "instruct": InstructResampler,
    "qformer": QFormerSampler,
    "mlp": MLPSampler,
}
DEFAULT_KIND = "perceiver"


def sampler_class(sampler: Mapping[str, Any]) -> type[Sampler]:
    """The class that a model config's `sampler` names.

    Raises:
        ConfigError: there is none of this kind.
    """
    kind = sampler.get("kind", DEFAULT_KIND)
    if kind not in SAMPLERS:
        raise ConfigError(f"unknown kind '{kind}'; {_near(str(kind), SAMPLERS)}", where="sampler.kind")
    return SAMPLERS[kind]


def complete_settings(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """A model config's `sampler` with its kind and all settings of that kind.

    Raises:
        ConfigError: an unknown kind or key, or a value that is no whole number from 1 on.
    """
    defaults = {"kind": DEFAULT_KIND} | sampler_class(sampler).defaults()
    for key, value in sampler.items():
        if key not in defaults:
            raise ConfigError(
                f"a sampler of kind '{sampler.get('kind', DEFAULT_KIND)}' has no '{key}'; {_near(key, defaults)}",
                where=f"sampler.{key}",
            )
        if key != "kind" and (type(value) is not int or value < 1):
            raise ConfigError(f"{value!r} is no whole number from 1 on", where=f"sampler.{key}")
    return defaults | dict(sampler)


def build_sampler(config: Blip3Config) -> Sampler:
    """The sampler of a model, with weights still to be filled."""
    settings = complete_settings(config.sampler)
    del settings["kind"]
    return sampler_class(config.sampler).from_config(settings, config)


def foreign_weights(
    found: Collection[str], wanted: Collection[str], config: Blip3Config, where: str, resized: Collection[str] = ()
) -> CheckpointError:
    """The error for weights that are not the sampler's.

    Args:
        found, wanted: names of the weights there are, and of the sampler's; all names without `sampler.`.
        resized: names of weights of another shape.
    """
    kind, differing = config.sampler["kind"], sorted(set(found) ^ set(wanted) | set(resized))
    kinds = _kinds_like(found, config)
    if kind in kinds:
        theirs = "of this kind in other sizes"
    else:
        theirs = " or ".join(f"'{name}'" for name in kinds) or "of no kind that is known"
    return CheckpointError(
        f"the model's sampler is of kind '{kind}', and the weights are {theirs}: they differ in "
        f"{len(differing)} weights, for example {differing[0]}",
        where=where,
        remedy="config.json and the weights must belong together; a sampler's kind can't be changed afterwards",
    )


def _kinds_like(names: Collection[str], config: Blip3Config) -> list[str]:
    """The kinds whose weights have such names, whatever their sizes."""
    tops, found = {name.split(".")[0] for name in names}, []
    for kind, sampler in SAMPLERS.items():
        with torch.device("meta"), no_init_weights():
            built = sampler.from_config(sampler.defaults(), config)
        if {name.split(".")[0] for name, _ in built.named_parameters()} == tops:
            found.append(kind)
    return found


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
