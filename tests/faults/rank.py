"""One rank of a real run in which something goes wrong, on purpose.

    python -m tests.faults.rank FAULT RUN/config.yaml     with RANK, WORLD_SIZE, ... set

Each fault patches the trainer on one rank and then lets it run.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import torch

from megablip import train
from megablip.data.loader import Loader
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import Blip3ForConditionalGeneration, PackedLoss

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
SECOND_STEP = 2  # with one forward a micro-batch, and two micro-batches a step


def write_digests() -> None:
    """After each step a line in RUN/digests_RANK.txt: the hash of this rank's masters, moments and Adam's step."""
    step = train.Trainer.step

    def patched(self, batch, total):
        step(self, batch, total)
        digest = hashlib.sha256(str(self.engine.adam_step()).encode())
        for piece in self.engine.local_slices():
            for kind, values in sorted(piece.tensors.items()):
                digest.update(f"{piece.name} {kind}".encode() + values.numpy().tobytes())
        with (Path(self.config.run_dir) / f"digests_{RANK}.txt").open("a") as stream:
            stream.write(digest.hexdigest() + "\n")

    train.Trainer.step = patched


def skip_sampler() -> None:
    """From the second step on the last rank does not call the sampler, as for a batch without images."""
    tokens, calls = Blip3ForConditionalGeneration._visual_tokens, []

    def patched(self, features, patch_mask, grids, instruction):
        calls.append(None)
        if RANK != LAST or len(calls) <= SECOND_STEP:
            return tokens(self, features, patch_mask, grids, instruction)
        print(f"skips the sampler at {time.monotonic()}", flush=True)
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


def without_batch() -> None:
    """No rank computes anything of step NAN_STEPS: as if it had no batch."""
    steps = {int(step) for step in os.environ["NAN_STEPS"].split(",")}
    forward, backward, take_step, calls = ZeroEngine.__call__, ZeroEngine.backward, ZeroEngine.step, []

    def absent(engine):
        return (len(calls) - 1) // engine.micro_batches + 1 in steps

    def patched_forward(self, **inputs):
        calls.append(None)
        if not absent(self):
            return forward(self, **inputs)
        nothing = torch.zeros(len(inputs["packed"].doc_lens))
        return PackedLoss(loss=torch.zeros(()), document_loss=nothing, document_labels=nothing)

    ZeroEngine.__call__ = patched_forward
    ZeroEngine.backward = lambda self, loss: None if absent(self) else backward(self, loss)
    ZeroEngine.step = lambda self, rates: None if absent(self) else take_step(self, rates)


def other_recipe() -> None:
    """The last rank reads another learning rate."""
    load = train.load_config

    def patched(path):
        return load(path, ["optimizer.lr=0.02"] if RANK == LAST else [])

    train.load_config = patched


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
    write_digests()
    globals()[sys.argv.pop(1)]()
    train.main()
