"""A training loop on DeepSpeed alone, as others write it, with megablip's model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch

from megablip.checkpoint.export import ExportReader, load_tower
from megablip.config import Config, load_config
from megablip.data.loader import Loader, micro_batches_per_step
from megablip.engine.topology import Topology
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.vision import encode_tiles


def train(topology: Topology, recipe: str, folder: str, strategies: list[dict[str, Any]], steps: int) -> list[Any]:
    """For each ZeRO config: `steps` steps, a checkpoint in folder/N, `steps` more from the data's beginning; losses."""
    config = load_config(recipe)
    return [_train(topology, config, Path(folder) / str(n), zero, steps) for n, zero in enumerate(strategies)]


def go_on(
    topology: Topology, recipe: str, folder: str, strategies: list[dict[str, Any]], steps: int
) -> list[list[float]]:
    """For each ZeRO config, steps from the data's beginning of an engine that has loaded the universal format."""
    config = load_config(recipe)
    return [_go_on(topology, config, folder, zero, steps) for zero in strategies]


def _go_on(topology: Topology, config: Config, folder: str, zero: dict[str, Any], steps: int) -> list[float]:
    engine = _engine(config, topology, zero, {"checkpoint": {"load_universal": True}})
    before = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    path, _ = engine.load_checkpoint(folder)
    assert path
    after = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in engine.optimizer.param_groups]
    assert zero["stage"] == 3 or after == before
    for group, settings in zip(engine.optimizer.param_groups, before, strict=True):
        group.update(settings)  # under ZeRO-3 DeepSpeed gives all groups the settings of the first one
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()  # and all sub-groups one tensor, which each then counts up
    return _steps(topology, config, engine, steps)


def _train(topology: Topology, config: Config, folder: Path, zero: dict[str, Any], steps: int) -> list[float]:
    engine = _engine(config, topology, zero, {})
    _steps(topology, config, engine, steps)
    engine.save_checkpoint(str(folder), tag=f"global_step{steps}")
    return _steps(topology, config, engine, steps)


def _engine(config: Config, topology: Topology, zero: dict[str, Any], more: dict[str, Any]) -> Any:
    model = Blip3ForConditionalGeneration(Blip3Config.from_pretrained(config.model.path), with_vision_tower=False)
    export = ExportReader(config.model.path)
    for name, p in model.named_parameters():
        p.data.copy_(export.read(name, "fp32", tuple(p.shape), 0, p.numel()).view(p.shape))
    model.train()
    optimizer, chosen = config.optimizer, {}
    for name, p in model.named_parameters():
        # The rule of decay, written down once more.
        decays = p.dim() > 1 and "embed" not in name and "latents" not in name
        chosen.setdefault((name.partition(".")[0], decays), []).append(p)
    groups = [{"params": params, **_settings(config, *key)} for key, params in chosen.items()]
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches_per_step(config, topology.world),
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": {"stage3_param_persistence_threshold": 0} | zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    adamw = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=ds_config | more, dist_init_required=False)
    return engine


def _settings(config: Config, part: str, decays: bool) -> dict[str, float]:
    optimizer = config.optimizer
    return {
        "lr": optimizer.lr_by_part.get(part, optimizer.lr),
        "weight_decay": optimizer.weight_decay if decays else 0.0,
    }


def _steps(topology: Topology, config: Config, engine: Any, steps: int) -> list[float]:
    model_config = Blip3Config.from_pretrained(config.model.path)
    tower = load_tower(ExportReader(config.model.path), model_config.vision_config, torch.float32, topology.device)
    found = []
    with Loader(config, config.model.path, model_config.layout, topology.rank, topology.world, None) as loader:
        for _ in range(steps):
            batch = next(loader)
            labels = sum(topology.gather(batch.valid_labels))
            total = 0.0
            for micro_batch in batch.micro_batches:
                losses = engine(packed=micro_batch, vision_features=encode_tiles(tower, micro_batch.tiles))
                engine.backward(losses.loss.view_as(losses.loss) * (topology.world / labels), scale_wrt_gas=False)
                engine.step()
                total += losses.loss.item()
            found.append(sum(topology.gather(total)) / labels)
    return found
