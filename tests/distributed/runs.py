"""Small real runs: hand-made shards, a tiny model, `megablip train` with its launcher."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from megablip.metrics.points import read_metrics
from tests.data.builders import write_tar

REPOSITORY = Path(__file__).parents[2]

MODEL = {
    "decoder": {
        "model_type": "phi3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "sampler": {"depth": 1, "heads": 2, "dim_head": 16, "num_latents": 4, "ff_mult": 2},
    "grids": [[1, 2], [2, 1]],
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8, "vision_use_head": False,
}  # fmt: skip


def make_start(folder: Path, decoder: dict[str, Any] | None = None, tower: dict[str, Any] | None = None) -> None:
    """folder/start: a model to train; folder/data: shards of images with captions, and of text.

    Args:
        decoder, tower: what their configs have in place of Phi-3's and SigLIP's, with `model_type`.
    """
    from transformers import AutoConfig, AutoModel

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "large", "small", "round", "square", "near", "far", "old"]
    sentences = [" ".join(rng.choice(words, size=rng.integers(2, 12))) for _ in range(120)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(sentences))
    run_python("-m", "tokenization", "train", "--input", str(corpus), "--vocab-size", "300",
               "--out", str(folder / "tokenizer"))  # fmt: skip
    vision = {"model_type": "siglip_vision_model"} | TOWER | (tower or {})
    AutoModel.from_config(AutoConfig.for_model(**vision)).save_pretrained(folder / "tower")
    model = MODEL | {"decoder": MODEL["decoder"] | (decoder or {})}
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    run_python("-m", "megablip.cli", "convert", "init", str(folder / "start"), "--tower", str(folder / "tower"),
               "--tokenizer", str(folder / "tokenizer"), "--model", str(folder / "model.yaml"))  # fmt: skip
    for shard in range(3):
        write_tar(
            folder / "data" / f"caption-{shard}.tar",
            [
                {"__key__": b"c%d-%d" % (shard, n), "png": _png(rng), "txt": sentences[20 * shard + n].encode()}
                for n in range(20)
            ],
        )
        write_tar(
            folder / "data" / f"text-{shard}.tar",
            [{"__key__": b"t%d-%d" % (shard, n), "txt": sentences[60 + 20 * shard + n].encode()} for n in range(20)],
        )


def make_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe over `make_start`'s folder; `changes` are dotted keys with __ for dots."""
    recipe: dict[str, Any] = {
        "stage": "pretrain",
        "run_dir": str(folder / "run"),
        "duration": "6 steps",
        "model": {"path": str(folder / "start")},
        "data": {
            "sources": [
                {"name": "caption", "shards": str(folder / "data" / "caption-*.tar"), "schema": "caption", "weight": 2},
                {"name": "text", "shards": str(folder / "data" / "text-*.tar"), "schema": "text", "weight": 1},
            ],
            "sequence_length": 96,
            "max_tiles": 8,
            "packing_buffer": 8,
        },
        "batch": {"lanes": 4, "sequences_per_lane": 1, "micro_batch_sequences": 1},
        "optimizer": {"lr": 0.01, "weight_decay": 0.05, "warmup": "2 steps"},
        "engine": {"ranks": 2, "threads": 1, "timeout_s": 60, "ds_config": str(_sharded(folder))},
        "checkpoint": {"every_steps": 100, "keep": 2},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = recipe
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _sharded(folder: Path) -> Path:
    """zero3, but with no parameter so small that every rank keeps it whole."""
    ds_config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "ds_config.json"
    path.write_text(json.dumps(ds_config))
    return path


def train(recipe: Path, *overrides: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`megablip train`; fails the test unless it exits with `check` (None: anything)."""
    return run_python("-m", "megablip.cli", "train", str(recipe), *overrides, check=check)


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, which must be there once each and in order."""
    points = read_metrics(run_dir)
    assert [point["step"] for point in points] == list(range(1, len(points) + 1))
    return [point["loss"] for point in points]


def outcome(run_dir: Path) -> str:
    return json.loads((run_dir / "status.json").read_text())["attempts"][-1]["outcome"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_python(*arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300
    )
    if check is not None and done.returncode != check:
        raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def _png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
