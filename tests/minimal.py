"""The smallest recipe, and what passes for a model before ranks are started."""

from __future__ import annotations

from pathlib import Path

RECIPE = {
    "stage": "pretrain",
    "run_dir": "runs/r",
    "duration": "100 steps",
    "model": {"path": "start"},
    "data": {
        "sources": [
            {"name": "a", "shards": "a-*.tar", "schema": "caption", "weight": 2},
            {"name": "b", "shards": ["b-0.tar", "b-1.tar"], "schema": "text", "weight": 1},
        ],
        "sequence_length": 128,
        "max_tiles": 8,
    },
    "batch": {"lanes": 4},
    "optimizer": {"lr": 0.001},
}


def make_start(folder: Path) -> Path:
    """A folder that looks like an export."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "megablip"}')
    (folder / "model.safetensors").touch()
    return folder
