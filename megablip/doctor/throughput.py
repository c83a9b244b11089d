"""The full-size model's forward and backward, without optimizer state: what each rank of a large run does.

On many ranks the optimizer's share of a step is small; on one, its state does
not fit (see check `step`), so it is left out here: weights and gradients in
bf16, 4 bytes a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from megablip.doctor.full_size import FullSize, flops_of, rates
from megablip.doctor.result import Place, Result, median_seconds, peak_memory
from megablip.doctor.synthetic import fill, random_tower
from megablip.engine.build import build_unfilled
from megablip.model.vision import encode_tiles
from megablip.train import build_trained


def check(place: Place) -> Iterator[Result]:
    size = FullSize.of(place)
    yield Result(
        "trained parameters", f"{size.layers} decoder layers, sampler, embeddings", size.parameters / 1e9, "1e9"
    )
    model = build_unfilled(partial(build_trained, size.model, size.recipe), torch.bfloat16, place.device)
    fill(model, seed=0)
    model.to(place.device).train()  # its buffers
    tower, batch = random_tower(size.model, place), size.micro_batch(place)
    labels, tokens, flops = batch.valid_labels, len(batch.input_ids), flops_of(model, tower, size.model, batch)

    def act() -> torch.Tensor:
        for p in model.parameters():
            p.grad = None
        moved = batch.to(place.device)
        loss = model(packed=moved, vision_features=encode_tiles(tower, moved.tiles)).loss / labels
        loss.backward()
        return loss.detach()

    loss, even = float(act()), math.log(size.model.text_config.vocab_size)
    yield Result(
        "loss", "relative difference to that of a guess, with random weights",
        abs(loss / even - 1), tolerance=0.2, remedy="the model computes nonsense: see the checks before",
    )  # fmt: skip
    yield Result(
        "gradients", "parameters whose gradient is missing, zero or not finite",
        sum(not _is_alive(p.grad) for p in model.parameters()), tolerance=0,
        remedy="a part of the model does not learn: report this with doctor.json",
    )  # fmt: skip
    yield Result("tower", "time of the micro-batch's tiles", median_seconds(
        place, lambda: encode_tiles(tower, batch.tiles), repeats=5), "s")  # fmt: skip
    for name, kept in (("activation checkpointing", False), ("all activations kept", True)):
        if kept:
            model.activation_checkpointing_disable()
        try:
            with peak_memory(place) as peak:
                act()
            yield from rates(place, tokens, flops, median_seconds(place, act, repeats=5), name)
            yield Result(f"{name}: peak memory", "beyond weights and gradients", peak.bytes / 2**30, "GiB")
        except torch.OutOfMemoryError:
            yield Result(f"{name}: does not fit", "a micro-batch of the recipe's size")


def _is_alive(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any())
