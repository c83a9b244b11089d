"""A training step of the full-size model on CUDA tensors without content, in a process of its own.

    python -m tests.model.fake_cuda LIBRARY

No value is computed, but shapes, precisions and devices are those of a GPU: a
tensor left on the CPU, or a kernel called with what it does not take, is an
error here as it is there.
"""

from __future__ import annotations

import ctypes
import os
import sys

ctypes.CDLL(sys.argv[1])  # first: torch asks but once whether there is a CUDA device

from dataclasses import fields  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megablip.config import Config  # noqa: E402
from megablip.doctor.full_size import FullSize  # noqa: E402
from megablip.doctor.result import Place  # noqa: E402
from megablip.engine.build import build_unfilled  # noqa: E402
from megablip.model.attention import use_backend  # noqa: E402
from megablip.model.blip3 import Blip3Config  # noqa: E402
from megablip.model.vision import build_tower, encode_tiles, freeze  # noqa: E402
from megablip.records import MicroBatch  # noqa: E402
from megablip.train import build_trained  # noqa: E402

# All layers once; the other backends differ within a layer.
RUNS = (("torch_varlen", 32), ("per_document", 1), ("dense", 1))


def main() -> None:
    on_cpu = Place(torch.device("cpu"), False, Path())  # full sizes, without a GPU's pinned memory
    size = FullSize.of(on_cpu)
    batch = size.micro_batch(on_cpu)
    labels = batch.valid_labels
    # The one size that depends on values: how many labels there are.
    torch.Tensor.nonzero = lambda self: torch.empty(labels, self.ndim, dtype=torch.int64, device=self.device)
    torch.Tensor.pin_memory = lambda self: self  # there is none
    for backend, layers in RUNS:
        use_backend(backend)
        step(size.with_layers(layers), size.recipe, batch, labels)


def step(config: Blip3Config, recipe: Config, batch: MicroBatch, labels: int) -> None:
    device = torch.device("cuda", 0)
    # Built outside: building compares values, and fake tensors have none.
    tower, model = (
        build_unfilled(build, torch.bfloat16, torch.device("meta"))
        for build in (
            lambda: build_tower(config.vision_config, pooling_head=False),
            partial(build_trained, config, recipe),
        )
    )
    # What lies on the host has its values: lengths and indices are made from them.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (tower, model):
            to_fake_device(module, mode, device)
        freeze(tower)
        model.train()
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        fake = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) and name not in ("patch_mask", "grid") else x
            for name, x in tensors.items()
        }
        moved = MicroBatch(**fake).to(device)
        losses = model(packed=moved, vision_features=encode_tiles(tower, moved.tiles))
        (losses.loss / labels).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, f"{name} has no gradient"
            assert (p.grad.device, p.grad.dtype, p.grad.shape) == (device, torch.bfloat16, p.shape), name
        assert losses.document_loss.device == device
        print(f"{sum(p.numel() for p in model.parameters())} parameters")


def to_fake_device(module: torch.nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(owner, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, mode.from_tensor(buffer).to(device))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # autograd's thread of the device now and then aborts the interpreter's own exit
