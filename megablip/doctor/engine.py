"""The trainer's engine on one rank against plain PyTorch: the same model, batches and optimizer.

A gradient that is reduced or stepped before it is complete, as happens where
streams don't wait for each other, shows as another loss or gradient norm.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from megablip.config import PARTS, EngineConfig
from megablip.doctor.result import Place, Result
from megablip.doctor.synthetic import fill, micro_batch, model_config, random_tower, run_config
from megablip.engine.build import build_unfilled
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.optimizer import parameter_groups
from megablip.engine.topology import Topology, init_distributed
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.vision import encode_tiles
from megablip.records import MicroBatch
from megablip.train import build_trained

STRATEGIES = ("zero3", "zero2", "zero1", "zero3_offload")
STEPS, MICRO_BATCHES = 8, 2
CLIP_NORM = 1.0

FULL: dict[str, dict[str, Any]] = {
    "decoder": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16,
                "num_key_value_heads": 16, "vocab_size": 32064},
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 2, "num_attention_heads": 16,
               "image_size": 384, "patch_size": 14},
    "sampler": {"depth": 2},
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "decoder": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 128},
    "vision": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 16, "patch_size": 8},
    "sampler": {"depth": 1, "heads": 2, "dim_head": 16, "num_latents": 4, "ff_mult": 2},
}  # fmt: skip


class Trace(NamedTuple):
    """Of each step."""

    losses: list[float]
    grad_norms: list[float]


def check(place: Place) -> Iterator[Result]:
    topology = init_distributed(timeout_s=120)
    config = model_config(**(SMALL if place.small else FULL))
    # So low that the steps stay smooth: where they overshoot, rounding alone moves gradient norms by tenths.
    rate = 1e-3 if place.small else 5e-5
    tower = random_tower(config, place)
    start = build_unfilled(partial(_build, config), torch.float32, place.device)
    fill(start, seed=0)
    batches = _batches(config, place)
    expected = _plain_steps(start, tower, batches, place, rate)
    yield Result(
        "plain PyTorch: loss", "last of the steps on the same batches, as a share of the first",
        expected.losses[-1] / expected.losses[0], tolerance=0.95, remedy="the reference itself does not learn",
    )  # fmt: skip
    for strategy in STRATEGIES:
        found = _engine_steps(strategy, start, tower, batches, place, topology, rate)
        remedy = f"don't train with {strategy}: report this with doctor.json"
        yield Result(
            f"{strategy}: loss", "last of the steps on the same batches, as a share of the first",
            found.losses[-1] / found.losses[0], tolerance=0.95, remedy=remedy,
        )  # fmt: skip
        for name, ours, theirs, tolerance in (
            ("losses", found.losses, expected.losses, 0.005),
            ("gradient norms", found.grad_norms, expected.grad_norms, 0.02),
        ):
            yield Result(
                f"{strategy}: {name}", f"largest relative difference to plain PyTorch in {STEPS} steps",
                max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), tolerance=tolerance, remedy=remedy,
            )  # fmt: skip
        gc.collect()


def _batches(config: Blip3Config, place: Place) -> list[MicroBatch]:
    """A step's micro-batches: images of several templates and text alone; then text alone, with the dummy tile."""
    words = 16 if place.small else 200
    first = [(words, ((1, 2),)), (3 * words, ()), (words // 2, ((2, 2), (3, 1)))]
    pinned = place.on_gpu
    return [
        micro_batch(config, documents, seed=number, pinned=pinned)
        for number, documents in enumerate((first, [(2 * words, ()), (words, ())]))
    ]


def _build(config: Blip3Config) -> Blip3ForConditionalGeneration:
    return Blip3ForConditionalGeneration(config, with_vision_tower=False)


def _plain_steps(
    start: Blip3ForConditionalGeneration,
    tower: torch.nn.Module,
    batches: list[MicroBatch],
    place: Place,
    rate: float,
) -> Trace:
    """bf16 forward and backward, gradients added up in fp32, AdamW on fp32 masters."""
    masters = {name: p.detach().clone().requires_grad_() for name, p in start.named_parameters()}
    named = [(name, p, tuple(p.shape)) for name, p in masters.items()]
    config = run_config(place.folder).optimizer
    adamw = torch.optim.AdamW(parameter_groups(named, config), lr=rate, betas=config.betas, eps=config.eps, fused=True)
    model = copy.deepcopy(start).to(place.device).train()
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32
        p.data = p.data.to(torch.bfloat16)
    trace, labels = Trace([], []), sum(batch.valid_labels for batch in batches)
    for _ in range(STEPS):
        total = 0.0
        for p in masters.values():
            p.grad = torch.zeros_like(p)
        for batch in batches:
            batch = batch.to(place.device)
            features = encode_tiles(tower, batch.tiles)
            loss = model(packed=batch, vision_features=features).loss
            (loss / labels).backward()
            total += float(loss.detach())
            for name, p in model.named_parameters():
                masters[name].grad += p.grad
                p.grad = None
        trace.losses.append(total / labels)
        trace.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), CLIP_NORM)))
        adamw.step()
        for name, p in model.named_parameters():
            p.data.copy_(masters[name])
    return trace


def _engine_steps(
    strategy: str,
    start: Blip3ForConditionalGeneration,
    tower: torch.nn.Module,
    batches: list[MicroBatch],
    place: Place,
    topology: Topology,
    rate: float,
) -> Trace:
    """The same by the trainer's engine, built and fed as train.py does it."""
    config = run_config(place.folder)
    ds_config = complete_ds_config(EngineConfig(ds_config=strategy), CLIP_NORM, MICRO_BATCHES, topology)
    engine = ZeroEngine(partial(build_trained, start.config, config), ds_config, config.optimizer, topology)
    values = dict(start.named_parameters())

    def read(name: str, kind: str, shape: tuple[int, ...], begin: int, end: int) -> torch.Tensor:
        return values[name].detach().view(-1)[begin:end]

    engine.load(read, moments=False)
    trace, labels = Trace([], []), sum(batch.valid_labels for batch in batches)
    rates = dict.fromkeys(PARTS, rate)
    for _ in range(STEPS):
        total = torch.zeros((), device=place.device)
        for batch in batches:
            batch = batch.to(place.device)
            features = encode_tiles(tower, batch.tiles)
            loss = engine(packed=batch, vision_features=features).loss
            engine.backward(loss / labels)
            engine.step(rates)
            total += loss.detach()
        trace.losses.append(float(total) / labels)
        trace.grad_norms.append(engine.grad_norm)
    return trace
