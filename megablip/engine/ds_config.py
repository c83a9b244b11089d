"""The DeepSpeed JSON of a run: read, checked, its `"auto"` values filled in.

`ds_configs/` has a file for each supported strategy; an own file may set more,
within the keys listed here. Whatever else DeepSpeed knows is refused, because
it moves or changes the state that checkpoints are made of, or was never tried.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from megablip.config import EngineConfig
from megablip.engine.topology import Topology
from megablip.errors import ConfigError

_KEYS = {
    "": {
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "data_types",
        "communication_data_type", "zero_optimization", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "checkpoint", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
        "comms_logger",
    },
    "bf16": {"enabled", "check_grad_overflow"},
    "data_types": {"grad_accum_dtype"},
    "checkpoint": {"tag_validation"},
    "zero_optimization": {
        "stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
        "allgather_partitions", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "offload_optimizer",
        "zero_hpz_partition_size",
    },
    "zero_optimization.offload_optimizer": {"device", "pin_memory"},
}  # fmt: skip
"""Keys a file may have, by section."""

_REASONS = {
    "zero_optimization.mics_shard_size": (
        "DeepSpeed has removed MiCS (0.19); zero3_hpz keeps gathers inside a node in its place"
    ),
    "zero_optimization.offload_param": "the weights would leave the memory that checkpoints are written from",
    "zero_optimization.zero_quantized_weights": "weights are rounded to 8 bits on the way, so resume is not exact",
    "zero_optimization.zero_quantized_gradients": "gradients are rounded to 4 bits on the way, so resume is not exact",
    "zero_optimization.offload_optimizer.nvme_path": "the moments would lie in files that checkpoints can't read",
    "zero_optimization.offload_optimizer.ratio": "DeepSpeed steps the two parts with different optimizers",
    "zero_optimization.round_robin_gradients": "it was never tried here",
    "fp16": "loss scaling makes steps depend on history that checkpoints don't hold; use bf16",
    "optimizer": "the recipe's section `optimizer` decides",
    "scheduler": "the recipe's section `optimizer` decides",
    "train_batch_size": "the recipe's section `batch` decides",
}


def read_ds_config(engine: EngineConfig) -> tuple[dict[str, Any], Path]:
    """The DeepSpeed JSON named by the recipe, and its path; strategies that are not supported are refused.

    Raises:
        ConfigError: no such file, broken JSON, or something that is not supported.
    """
    path = Path(engine.ds_config)
    if path.suffix != ".json":
        path = Path(str(files("megablip") / "ds_configs")) / f"{engine.ds_config}.json"
    try:
        ds_config = json.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(entry.name.removesuffix(".json") for entry in path.parent.glob("*.json"))
        raise ConfigError(
            "the DeepSpeed config does not exist", where=str(path), remedy=f"known names: {', '.join(known)}"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed config is no JSON: {error}", where=str(path)) from None
    sections = ("zero_optimization", "bf16")
    if not isinstance(ds_config, dict) or not all(isinstance(ds_config.get(name), dict) for name in sections):
        raise ConfigError(f"the DeepSpeed config lacks the sections {', '.join(sections)}", where=str(path))
    _check_keys(ds_config, path)
    _check_strategy(ds_config, engine, path)
    return ds_config, path


def complete_ds_config(
    engine: EngineConfig, clip_norm: float, micro_batches: int, topology: Topology
) -> dict[str, Any]:
    """The DeepSpeed JSON named by the recipe, its `"auto"` values filled in.

    Raises:
        ConfigError: as `read_ds_config`; a value that the recipe decides
            otherwise; groups of ranks (hpZ) that the world size is no multiple of.
    """
    ds_config, path = read_ds_config(engine)
    on_gpu = topology.device.type == "cuda"
    decided: dict[tuple[str, ...], Any] = {
        # Sequences are packed, so a micro-batch is one item to DeepSpeed.
        ("train_micro_batch_size_per_gpu",): 1,
        ("gradient_accumulation_steps",): micro_batches,
        ("gradient_clipping",): clip_norm,
        ("bf16", "enabled"): engine.precision == "bf16",
        # Without it ZeRO-2 steps on a gradient that is not finite, in bf16 only.
        ("bf16", "check_grad_overflow"): True,
        ("data_types", "grad_accum_dtype"): "fp32",
    }
    for (*parents, key), value in decided.items():
        section = ds_config.setdefault(parents[0], {}) if parents else ds_config
        given = section.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"{'.'.join([*parents, key])} is {given}, megablip makes it {value}",
                where=str(path),
                remedy='write "auto" there',
            )
        section[key] = value
    # DeepSpeed's own clock, on by default, waits for the device before each forward and after each backward.
    ds_config["timers"] = {"throughput": {"enabled": False}}
    zero = ds_config["zero_optimization"]
    _fill(zero, "overlap_comm", on_gpu)
    if "offload_optimizer" in zero:
        _fill(zero["offload_optimizer"], "pin_memory", on_gpu)
    if "zero_hpz_partition_size" in zero:
        _fill(zero, "zero_hpz_partition_size", topology.ranks_per_node)
        size = zero["zero_hpz_partition_size"]
        if not isinstance(size, int) or size < 1 or topology.world % size:
            raise ConfigError(
                f"{topology.world} ranks can't be cut into groups of zero_hpz_partition_size = {size}",
                where=str(path),
                remedy='write "auto" for the ranks of a node, or a divisor of the number of ranks',
            )
    return ds_config


def _check_keys(ds_config: dict[str, Any], path: Path) -> None:
    for section, known in _KEYS.items():
        node: Any = ds_config
        for name in section.split(".") if section else ():
            node = node.get(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{section} is no section of the DeepSpeed config", where=str(path))
        for key in sorted(node.keys() - known):
            full = f"{section}.{key}" if section else key
            reason = _REASONS.get(full, "what it does to weights, moments and resume is not known here")
            raise ConfigError(
                f"{full} is not supported: {reason}", where=str(path), remedy="start from a file of ds_configs/"
            )


def _check_strategy(ds_config: dict[str, Any], engine: EngineConfig, path: Path) -> None:
    zero = ds_config["zero_optimization"]
    stage = zero.get("stage")
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    refusals = [
        (stage not in (0, 1, 2, 3), f"there is no ZeRO stage {stage}", "use zero1, zero2 or zero3"),
        (
            stage == 0 and engine.precision == "bf16",
            "ZeRO stage 0 can't train in bf16: DeepSpeed adds gradients up in bf16 there, and fp32 is not to be had",
            "use zero1, which needs less memory and the same traffic, or engine.precision=fp32",
        ),
        (
            offload not in ("none", "cpu"),
            f"the optimizer can't be offloaded to {offload}: checkpoints are written from memory",
            "offload to cpu",
        ),
        (
            offload != "none" and stage != 3,
            f"optimizer offload with ZeRO stage {stage} is not supported: it was not tried",
            "use zero3_offload",
        ),
        (
            "zero_hpz_partition_size" in zero and stage != 3,
            f"zero_hpz_partition_size has no meaning with ZeRO stage {stage}",
            "use zero3_hpz",
        ),
        (
            stage == 3 and engine.compile_blocks,
            "engine.compile_blocks gains nothing with ZeRO stage 3: hooks before and after each module "
            "gather its weights, and cut what is compiled there",
            "use zero1 or zero2, or leave compile_blocks out",
        ),
    ]
    for refused, what, remedy in refusals:
        if refused:
            raise ConfigError(what, where=str(path), remedy=remedy)


def _fill(section: dict[str, Any], key: str, value: Any) -> None:
    if section.get(key, "auto") == "auto":
        section[key] = value
