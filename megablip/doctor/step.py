"""The full-size recipe's step by the trainer's engine, ZeRO-3 on one rank, with as many decoder layers as fit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from megablip.config import PARTS
from megablip.doctor.full_size import STATE_BYTES, FullSize, flops_of, rates
from megablip.doctor.result import Place, Result, median_seconds
from megablip.doctor.synthetic import random_tower, random_values
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import init_distributed
from megablip.engine.zero import ZeroEngine
from megablip.model.vision import encode_tiles
from megablip.train import build_trained


def check(place: Place) -> Iterator[Result]:
    size = FullSize.of(place)
    for name, each in STATE_BYTES.items():
        yield Result(f"memory: {name}", f"{each} bytes x {size.parameters:,}", each * size.parameters / 2**30, "GiB")
    yield Result("memory: all of that", "ZeRO-3 on one rank", size.state_bytes / 2**30, "GiB")
    layers = size.fitting_layers
    fits = "of all layers" if layers == size.layers else f"so only {layers} of {size.layers} decoder layers are taken"
    yield Result("memory: device", fits, size.device_bytes / 2**30, "GiB")

    topology = init_distributed(timeout_s=120)
    config, recipe = size.with_layers(layers), size.recipe
    ds_config = complete_ds_config(recipe.engine, recipe.optimizer.clip_norm, 1, topology)
    began = time.perf_counter()
    engine = ZeroEngine(partial(build_trained, config, recipe), ds_config, recipe.optimizer, topology)
    generator = torch.Generator(place.device).manual_seed(0)
    engine.load(
        lambda name, kind, shape, start, end: random_values(name, (end - start,), torch.float32, generator),
        moments=False,
    )
    tower, batch = random_tower(config, place), size.micro_batch(place)
    yield Result("engine: start", "build and load", time.perf_counter() - began, "s")
    labels, tokens = batch.valid_labels, len(batch.input_ids)
    losses = []

    def step() -> None:
        moved = batch.to(place.device)
        loss = engine(packed=moved, vision_features=encode_tiles(tower, moved.tiles)).loss / labels
        engine.backward(loss)
        engine.step(dict.fromkeys(PARTS, 1e-4))
        losses.append(float(loss.detach()))

    seconds = median_seconds(place, step, repeats=5)
    yield Result(
        "loss", "last of the steps on one batch, as a share of the first",
        losses[-1] / losses[0], tolerance=0.995, remedy="the engine does not learn: see check `engine`",
    )  # fmt: skip
    flops = flops_of(engine.module, tower, config, batch)
    yield from rates(place, tokens, flops, seconds, f"step of {layers} layers")
    if place.on_gpu:
        peak = torch.cuda.max_memory_allocated(place.device) / 2**30
        yield Result("peak memory", "of start and steps", peak, "GiB")
    whole = flops_of(size.without_storage, tower, size.model, batch)
    yield Result(
        f"speed with {size.layers} layers", "scaled by the FLOPs, not measured" if layers < size.layers else "measured",
        tokens / (seconds * whole / flops), "tokens/s",
    )  # fmt: skip
