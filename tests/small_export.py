"""The smallest model with a real tokenizer and processor."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import SiglipVisionConfig, SiglipVisionModel

from megablip.convert.init import init_model
from tokenization.train import train_tokenizer

SETTINGS = {
    "decoder": {
        "model_type": "phi3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "sampler": {"depth": 1, "heads": 2, "dim_head": 8, "num_latents": 2, "ff_mult": 2},
    "grids": [[1, 2], [2, 1]],
}  # fmt: skip


def make_ingredients(folder: Path, chat: bool = False) -> Path:
    """folder/tokenizer, folder/tower and folder/model.yaml, for `megablip convert init`."""
    (folder / "corpus.txt").write_text("one two three\nfour five six\n" * 20)
    train_tokenizer([folder / "corpus.txt"], folder / "tokenizer", 290 + 4 * chat, chat=chat)
    config = SiglipVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # or now and then two answers of this noise would be alike
        SiglipVisionModel(config).save_pretrained(folder / "tower")
    (folder / "model.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def make_export(folder: Path, chat: bool = False) -> Path:
    """A folder that `from_pretrained` loads; its answers are noise."""
    parts = make_ingredients(folder, chat)
    init_model(
        folder / "export", tower=parts / "tower", tokenizer=parts / "tokenizer", model=parts / "model.yaml", seed=0
    )
    return folder / "export"
