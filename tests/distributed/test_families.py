"""Decoders and towers of other families, trained inside the engine. Three minutes on two busy cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megablip.checkpoint.slices import SliceReader
from tests.distributed import runs

STEPS = 4
FAMILIES = {
    "llama, siglip2": (
        {"model_type": "llama", "num_key_value_heads": 1},
        {"model_type": "siglip2_vision_model", "num_patches": 9},  # 3 x 3: its table of positions is resized
    ),
    "qwen3, clip": (
        {
            "model_type": "qwen3", "head_dim": 24, "use_sliding_window": True, "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"model_type": "clip_vision_model"},
    ),
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("families", FAMILIES)
def test_ranks_agree_and_every_weight_is_trained(tmp_path: Path, families: str):
    """ZeRO-3 with the tower inside: the losses of two ranks are those of one, and nothing stays behind."""
    runs.make_start(tmp_path, *FAMILIES[families])
    found = []
    for ranks in (1, 2):
        recipe = runs.make_recipe(
            tmp_path,
            run_dir=str(tmp_path / f"run-{ranks}"),
            duration=f"{STEPS} steps",
            model__train_tower=True,
            engine__ranks=ranks,
            engine__precision="fp32",
        )
        runs.train(recipe)
        found.append(runs.losses(tmp_path / f"run-{ranks}"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]
    start = load_file(tmp_path / "start" / "model.safetensors")
    reader = SliceReader(tmp_path / "run-2" / "checkpoints" / f"step_{STEPS:08d}")
    assert set(reader.parameters) == set(start)
    for name, value in start.items():
        assert not torch.equal(reader.whole(name), value), name
    export = tmp_path / "export"
    runs.run_python("-m", "megablip.cli", "convert", "zero-to-hf", str(tmp_path / "run-2"), str(export))
    written = load_file(export / "model.safetensors")
    assert all(torch.equal(written[name], reader.whole(name)) for name in start)
