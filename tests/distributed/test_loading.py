"""Host memory of a rank while it loads: its own slices + 20 % + 500 MB, no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.loading import LAYERS, TOKENS, WIDTH
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.slow  # about 3 minutes in all

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """440 MB of random weights in four files with an index."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (TOKENS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"layers.{layer}.weight": (WIDTH, WIDTH), f"layers.{layer}.bias": (WIDTH,)}
    file_of = {name: f"model-{number % 4}.safetensors" for number, name in enumerate(shapes)}
    for file in set(file_of.values()):
        names = [name for name in shapes if file_of[name] == file]
        save_file({name: torch.rand(shapes[name], generator=generator) for name in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


@pytest.mark.parametrize(
    ("strategy", "precision", "source"),
    [
        ("zero3", "bf16", "export"),  # first: it writes what "checkpoint" reads
        ("zero3", "bf16", "checkpoint"),
        ("zero3_offload", "bf16", "export"),
        ("zero2", "bf16", "checkpoint"),
        ("zero1", "bf16", "export"),
        ("zero0", "fp32", "export"),
    ],
)
def test_a_rank_keeps_within_its_share(export, strategy, precision, source):
    keep = (strategy, source) == ("zero3", "export")
    for found in run_ranks(2, "tests.distributed.loading:load", str(export), strategy, precision, source, keep):
        own, peak = found["own_bytes"], found["peak_bytes"]
        print(f"{strategy} {precision} from {source}: own {own / MEGABYTE:.0f} MB, peak {peak / MEGABYTE:.0f} MB")
        assert found["exact"]
        assert peak <= 1.2 * own + 500 * MEGABYTE
