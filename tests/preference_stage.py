"""A small preference stage: a model, pairs in shards, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from megablip.config import Config, load_config
from tests.data.builders import write_tar
from tests.data.small import image
from tests.small_export import make_export

WORDS = ("one", "two", "three", "four", "five", "six")
PAIRS = 14


def pair(number: int, **members: bytes) -> dict:
    chosen, rejected = WORDS[number % 6], f"{WORDS[(number + 1) % 6]} {WORDS[number % 5]}"
    content = {"prompt": f"{WORDS[number % 4]} two", "chosen": chosen, "rejected": rejected}
    pixels = {"png": image(8 * (1 + number % 2), 8 * (1 + number % 3 % 2), 12 * number).data} if number % 3 else {}
    return {"__key__": b"p%02d" % number, **pixels, "json": json.dumps(content).encode(), **members}


def make_stage(folder: Path, **preference) -> Config:
    """Of fourteen pairs in two shards, with and without images; one more fits no sequence."""
    export = make_export(folder, chat=True)
    rows = [pair(number) for number in range(PAIRS)]
    long = {"prompt": "one " * 90, "chosen": "two", "rejected": "three"}
    rows.append({"__key__": b"long", "json": json.dumps(long).encode()})
    write_tar(folder / "pairs" / "a.tar", rows[::2])
    write_tar(folder / "pairs" / "b.tar", rows[1::2])
    recipe = {
        "stage": "dpo",
        "run_dir": str(folder / "run"),
        "duration": "2 epochs",
        "model": {"path": str(export), "lora": {"rank": 2, "dropout": 0.0}},
        "preference": {"beta": 0.3, **preference},
        "data": {
            "sources": [
                {"name": "pairs", "shards": str(folder / "pairs" / "*.tar"), "schema": "preference", "weight": 1}
            ],
            "sequence_length": 128,
            "max_tiles": 8,
            "packing_buffer": 4,
            "decode_workers": 0,
        },
        "batch": {"lanes": 2},
        "optimizer": {"lr": 0.01},
        "engine": {"ranks": 2, "threads": 1, "timeout_s": 60, "precision": "fp32"},
        "checkpoint": {"every_steps": 100},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_config(path)
