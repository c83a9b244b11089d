"""One rank of a real run in which something goes wrong, on purpose.

    python -m tests.faults.rank FAULT RUN/config.yaml     with RANK, WORLD_SIZE, ... set

Each fault patches the trainer on one rank and then lets it run.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from megablip import train
from megablip.data.loader import Loader
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import Blip3ForConditionalGeneration

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
SECOND_STEP = 2  # with one forward a micro-batch, and two micro-batches a step


def none() -> None: ...


def skip_sampler() -> None:
    """From the second step on the last rank does not call the sampler, as for a batch without images."""
    tokens, calls = Blip3ForConditionalGeneration._visual_tokens, []

    def patched(self, features, patch_mask, grids):
        calls.append(None)
        if RANK != LAST or len(calls) <= SECOND_STEP:
            return tokens(self, features, patch_mask, grids)
        config = self.config
        shape = (len(features), config.layout.tokens_per_tile, config.text_config.hidden_size)
        return features.new_zeros(shape)

    Blip3ForConditionalGeneration._visual_tokens = patched


def nan_loss() -> None:
    """At step NAN_STEPS (comma-separated) the loss of the last rank's first micro-batch is NaN."""
    steps = {int(step) for step in os.environ["NAN_STEPS"].split(",")}
    forward, calls = ZeroEngine.__call__, []

    def patched(self, **inputs):
        losses = forward(self, **inputs)
        step, micro_batch = divmod(len(calls), self.micro_batches)
        calls.append(None)
        if RANK == LAST and step + 1 in steps and micro_batch == 0:
            losses.loss = losses.loss * torch.nan
        return losses

    ZeroEngine.__call__ = patched


def infinite_gradient() -> None:
    """At step NAN_STEPS the last rank's loss is finite and its gradient is not."""
    steps = {int(step) for step in os.environ["NAN_STEPS"].split(",")}
    backward, calls = ZeroEngine.backward, []

    def patched(self, loss):
        step, micro_batch = divmod(len(calls), self.micro_batches)
        calls.append(None)
        if RANK == LAST and step + 1 in steps and micro_batch == 0:
            loss = loss * torch.inf
        backward(self, loss)

    ZeroEngine.backward = patched


def slow_data() -> None:
    """The last rank waits for the data of its third step for ever."""
    following, calls = Loader.__next__, []

    def patched(self):
        calls.append(None)
        if RANK == LAST and len(calls) == 3:
            time.sleep(1000)
        return following(self)

    Loader.__next__ = patched


def error() -> None:
    """The last rank fails in its second step, outside any collective."""
    forward, calls = ZeroEngine.__call__, []

    def patched(self, **inputs):
        calls.append(None)
        if RANK == LAST and len(calls) > SECOND_STEP:
            raise RuntimeError("something of the last rank's own")
        return forward(self, **inputs)

    ZeroEngine.__call__ = patched


def slow_tower() -> None:
    """The last rank's frozen tower is slow."""
    encode = train.encode_tiles

    def patched(tower, tiles):
        if RANK == LAST:
            time.sleep(0.1)
        return encode(tower, tiles)

    train.encode_tiles = patched


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    train.main()
