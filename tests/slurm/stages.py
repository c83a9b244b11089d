"""All five stages at their smallest: a model to start from, shards of each kind, a recipe for each stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.data.builders import write_tar
from tests.data.small import image
from tests.small_export import make_export

WORDS = ("one", "two", "three", "four", "five", "six")
SAMPLES = 24
STAGES = ("pretrain", "sft", "interleave", "dpo", "safety")
SCHEMAS = dict(zip(STAGES, ("caption", "conversation", "conversation", "preference", "safety"), strict=True))
LORA = {"rank": 2, "dropout": 0.0}


def content(stage: str, number: int) -> dict[str, Any] | bytes:
    """The text of a sample, as its schema lays it out."""
    asked, answer = WORDS[number % 5], WORDS[(number + 1) % 6]
    if stage == "pretrain":
        return f"{asked} {answer}".encode()
    if stage == "dpo":
        return {"prompt": asked, "chosen": answer, "rejected": f"{answer} {asked}"}
    if stage == "safety":
        return {"instr-resp": [{"instruction": asked, "response": answer}]}
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"conversations": turns * (1 + (stage == "interleave"))}


def make_stages(folder: Path) -> dict[str, Path]:
    """The recipe of each stage; folder/held-out-STAGE.tar is what a model may be asked after it."""
    folder.mkdir()
    export = make_export(folder, chat=True)
    recipes = {}
    for stage in STAGES:
        rows = []
        for number in range(SAMPLES):
            text = content(stage, number)
            words = {"txt": text} if isinstance(text, bytes) else {"json": json.dumps(text).encode()}
            rows.append({"__key__": b"s%02d" % number, "png": image(8, 8 * (1 + number % 2), 9 * number).data} | words)
        shard = write_tar(folder / f"{stage}.tar", rows)
        write_tar(folder / f"held-out-{stage}.tar", rows[:4])
        recipe = {
            "stage": stage,
            "run_dir": str(folder / "runs" / stage),
            "duration": "4 steps",
            "model": {"path": str(export)} | ({"lora": LORA} if stage in ("dpo", "safety") else {}),
            "data": {
                "sources": [{"name": "only", "shards": str(shard), "schema": SCHEMAS[stage], "weight": 1}],
                "sequence_length": 64,
                "max_tiles": 8,
                "packing_buffer": 4,
                "decode_workers": 0,
            },
            "batch": {"lanes": 2},
            "optimizer": {"lr": 0.01},
            "engine": {"ranks": 1, "threads": 1, "timeout_s": 60, "precision": "fp32"},
            "checkpoint": {"every_steps": 100},
        }  # fmt: skip
        recipes[stage] = folder / f"{stage}.yaml"
        recipes[stage].write_text(yaml.safe_dump(recipe))
    return recipes
