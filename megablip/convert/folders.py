"""What a Hugging Face folder holds beside weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megablip.convert.remote_code import AUTO_MAPS, write_remote_code
from megablip.errors import CheckpointError

_COMPANIONS = (".json", ".model", ".jinja", ".txt")
"""Config, generation config, processor, chat template, tokenizer with its vocabulary and merges."""


def copy_companions(
    start: Path, folder: Path, dtype: torch.dtype, changes: dict[str, Any] | None = None, *, remote_code: bool = False
) -> None:
    """Copy what a folder has beside weights, and say in its config what dtype they have now.

    Args:
        changes: keys of config.json and processor_config.json that are other ones now.
        remote_code: put the model's code beside the weights, to load them where megablip is not installed.

    Raises:
        CheckpointError: `start` has no readable config.json.
    """
    for path in start.iterdir():
        if path.suffix in _COMPANIONS and not path.name.startswith(("model.", "adapter_")):
            shutil.copyfile(path, folder / path.name)
    for name in AUTO_MAPS:
        if name == "config.json" or (folder / name).exists():
            config = read_json(folder / name) | (changes or {})
            config.pop("auto_map", None)  # its code is not copied
            if name == "config.json":
                config["dtype"] = str(dtype).removeprefix("torch.")
            _write_json(folder / name, config)
    if remote_code:
        write_remote_code_into(folder)


def write_remote_code_into(folder: Path) -> None:
    """Put the model's code beside its config and processor, and name it there."""
    for name, auto_map in AUTO_MAPS.items():
        if (folder / name).exists():
            _write_json(folder / name, read_json(folder / name) | {"auto_map": auto_map})
    write_remote_code(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if it is no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the file can't be read: {error}", where=str(path), remedy="copy it again") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def say_written(output: Path, source: Path | str) -> None:
    print(f"wrote {output} from {source}")
