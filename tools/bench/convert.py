"""Conversions beside DeepSpeed's own: zero_to_fp32, ds_to_universal; and beside a plain copy.

Checkpoints of ZeRO-3 at 4 ranks, written by torch.save in DeepSpeed's layout, which
tests/checkpoint/test_deepspeed_files.py checks against real runs: 388 million
parameters in 37 tensors for weights, 97 million for the whole state. The page
cache is warm. Each conversion has a process of its own (convert_side.py); all take
turns, the first turn is not counted, and the outputs are compared.

ds_to_universal moves 51 bytes a parameter (reads, fragments, reads, writes), a copy
of 12 bytes a parameter at least 24: three times less can't be reached by copying.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from tools.bench.core import Rival, Row

WORLD, LAYERS, WIDTH, REPEATS = 4, 7, 2048, 5
REPOSITORY = Path(__file__).parents[2]
WEIGHTS = {"zero_to_fp32": ("rival_to_hf", ""), "fp32": ("fp32", ""), "bf16": ("bf16", "")}
SYNCED = {"zero_to_fp32 + fsync": ("rival_to_hf", "sync"), "fp32 + fsync": ("fp32", "sync")}
MIB = 2**20


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="megablip-convert-") as name:
        folder = Path(name)
        large, small = folder / "large", folder / "small"
        make_checkpoint(large, shapes(WIDTH))
        make_checkpoint(small, shapes(WIDTH // 2))
        found = measure(folder, {what: (*how, large) for what, how in (WEIGHTS | SYNCED).items()})
        compare_weights(folder)
        states = {"ds_to_universal": ("rival_to_universal", ""), "import-zero": ("import_zero", "")}
        found |= measure(folder, {what: (*how, small) for what, how in states.items()})
        compare_states(folder)
        run = folder / "import-zero"
        found |= measure(
            folder, {"own format": ("own_to_hf", "sync", run), "copy": ("plain_copy", "sync", folder / "own format")}
        )
        show(found)

    def median(what: str, key: str = "seconds") -> float:
        return statistics.median(result[key] for result in found[what])

    plain, synced = median("zero_to_fp32"), median("zero_to_fp32 + fsync")
    universal = median("ds_to_universal")
    memory = max(result["memory"] for what in ("fp32", "bf16", "fp32 + fsync") for result in found[what])
    return [
        Row("zero_to_hf_fp32", median("fp32"), "s", "lower", 4.0, Rival("zero_to_fp32", plain)),
        Row("zero_to_hf_bf16", median("bf16"), "s", "lower", 2.5, Rival("zero_to_fp32, to fp32", plain)),
        Row("zero_to_hf_fsync", median("fp32 + fsync"), "s", "lower", 2.0, Rival("zero_to_fp32", synced)),
        Row("zero_to_hf_memory", memory / MIB, "MiB", "lower", 96),
        Row("import_zero", median("import-zero"), "s", "lower", 3.0, Rival("ds_to_universal", universal)),
        Row(
            "import_zero_bytes", median("import-zero", "bytes") / MIB, "MiB", "lower", 3.0,
            Rival("ds_to_universal", median("ds_to_universal", "bytes") / MIB),
        ),
        Row("import_zero_memory", median("import-zero", "memory") / MIB, "MiB", "lower", 96),
        Row("own_format_to_hf", median("own format"), "s", "lower", 0.7, Rival("plain copy", median("copy"))),
    ]  # fmt: skip


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of a decoder, with sizes that 4 ranks do not divide."""
    found: dict[str, tuple[int, ...]] = {"decoder.model.embed_tokens.weight": (32013, width)}
    for layer in range(LAYERS):
        name = f"decoder.model.layers.{layer}"
        found |= {
            f"{name}.self_attn.qkv_proj.weight": (3 * width, width),
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_up_proj.weight": (4 * width, width),
            f"{name}.mlp.down_proj.weight": (width, 2 * width),
            f"{name}.input_layernorm.weight": (width,),
        }
    return found | {"sampler.latents": (129, 1151), "decoder.lm_head.weight": (14001, width)}


def make_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Files of ZeRO-3 at WORLD ranks; and `model`, the Hugging Face folder that such a run begins with."""
    step = folder / "step"
    step.mkdir(parents=True)
    widths = {name: -(-math.prod(shape) // WORLD) for name, shape in shapes.items()}
    common = {"module": {}, "buffer_names": [], "shared_params": {}, "frozen_param_shapes": {}, "ds_config": {}}
    common |= {"frozen_param_fragments": {}, "global_steps": 7, "skipped_steps": 0, "ds_version": "0.19.8"}
    common |= {"dp_world_size": WORLD, "mp_world_size": 1}
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    for rank in range(WORLD):
        generator = torch.Generator().manual_seed(rank)
        flat = [torch.randn(sum(widths.values()), generator=generator) for _ in range(3)]
        adam = {"step": torch.tensor(7.0), "exp_avg": flat[1], "exp_avg_sq": flat[2].abs_()}
        group = {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "params": [0]}
        optimizer: dict[str, Any] = {
            "zero_stage": 3, "partition_count": WORLD, "overflow": False, "dynamic_loss_scale": False,
            "optimizer_state_dict": {"state": {0: adam}, "param_groups": [group]}, "fp32_flat_groups": [flat[0]],
        }  # fmt: skip
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, step / f"{prefix}_optim_states.pt")
        torch.save(common | {"param_shapes": [sizes]}, step / f"{prefix}_model_states.pt")
    (folder / "latest").write_text("step")
    model = folder / "model"
    model.mkdir()
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights | {"vision_tower.bias": torch.zeros(8)}, model / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (model / file).write_text("{}")


def measure(folder: Path, variants: dict[str, tuple[str, str, Path]]) -> dict[str, list[dict[str, float]]]:
    """What each variant's runs reported; the outputs of the last ones stay as folder/NAME."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    sides, log = {}, (folder / "log.txt").open("w+")
    for name, (what, sync, source) in variants.items():
        command = [sys.executable, "-m", "tools.bench.convert_side", what, str(source), str(folder / name)]
        sides[name] = subprocess.Popen(
            command + ([sync] if sync else []),
            cwd=REPOSITORY,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    try:
        for _ in range(1 + REPEATS):
            for name, side in sides.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                print(file=side.stdin, flush=True)
                line = side.stdout.readline()
                if not line:
                    log.seek(0)
                    raise RuntimeError(f"{name} has ended:\n{log.read()[-3000:]}")
                found[name].append(json.loads(line))
    finally:
        for side in sides.values():
            side.kill()
            side.wait()
        log.close()
    return {name: results[1:] for name, results in found.items()}


def compare_weights(folder: Path) -> None:
    """Raises AssertionError unless all outputs hold the same weights."""
    files = {name: safe_open(next((folder / name).glob("*.safetensors")), "pt") for name in (*WEIGHTS, *SYNCED)}
    for name in shapes(WIDTH):
        expected = files["zero_to_fp32"].get_tensor(name)
        assert torch.equal(files["fp32"].get_tensor(name), expected), name
        assert torch.equal(files["fp32 + fsync"].get_tensor(name), expected), name
        assert torch.equal(files["bf16"].get_tensor(name), expected.bfloat16()), name


def compare_states(folder: Path) -> None:
    """Raises AssertionError unless 2 and 8 ranks read from both outputs the same slices of the state."""
    from megablip.checkpoint.slices import SliceReader

    reader = SliceReader(next((folder / "import-zero" / "checkpoints").glob("step_*")))
    for name, shape in shapes(WIDTH // 2).items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            whole = torch.load(folder / "ds_to_universal" / "zero" / name / f"{kind}.pt", weights_only=True)
            numel = math.prod(shape)
            for world in (2, 8):
                width = -(-numel // world)
                for start in range(0, numel, width):
                    end = min(start + width, numel)
                    found = reader.read(name, kind, shape, start, end)
                    assert torch.equal(found, whole.view(-1)[start:end]), (name, kind, world)


def show(found: dict[str, list[dict[str, float]]]) -> None:
    table = Table("conversion", "median s", "of the runs", "anonymous MiB", "MiB moved", title="conversions")
    for name, results in found.items():
        seconds = [result["seconds"] for result in results]
        table.add_row(
            name,
            f"{statistics.median(seconds):.2f}",
            " ".join(f"{value:.2f}" for value in seconds),
            f"{max(result['memory'] for result in results) / MIB:,.0f}",
            f"{statistics.median(result['bytes'] for result in results) / MIB:,.0f}",
        )
    Console().print(table)
