"""What the ranks of test_training.py do to compare a trainer with its export."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megablip.checkpoint.commit import newest_committed
from megablip.checkpoint.export import ExportReader, load_tower
from megablip.checkpoint.slices import SliceReader
from megablip.config import load_config
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration


def compare(topology: Topology, run_dir: str, export: str) -> dict[str, Any]:
    """Weights of the trainer's engine and of its bf16 export, and what both generate."""
    config = load_config(Path(run_dir) / "config.yaml")
    model_config = Blip3Config.from_pretrained(config.model.path)
    ds_config = complete_ds_config(config.engine, 1.0, 1, topology)
    trained = config.model.train_tower
    engine = ZeroEngine(
        lambda: Blip3ForConditionalGeneration(model_config, with_vision_tower=trained, train_tower=trained),
        ds_config,
        config.optimizer,
        topology,
    )
    engine.load(SliceReader(newest_committed(Path(run_dir))).read, moments=True)
    tower = load_tower(ExportReader(config.model.path), model_config.vision_config, torch.bfloat16, topology.device)

    exported = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.bfloat16).eval()
    weights = exported.state_dict()
    equal = sum(bool(torch.equal(weights[name], value)) for name, value in engine.gathered())

    processor = AutoProcessor.from_pretrained(export)
    rng = np.random.default_rng(5)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    inputs = processor(text=["<image>red", "blue", "<image>far <image>"], images=[buffer.getvalue()] * 3)
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    module = engine.module.eval()
    cut_up = ds_config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=cut_up):
        if not trained:
            module.vision_tower = tower
        inside = module.generate(**inputs, **options).tolist()
        if not trained:
            module.vision_tower = None
    outside = exported.generate(**inputs, **options).tolist()
    return {"weights_equal": equal, "trainer": inside, "export": outside}
