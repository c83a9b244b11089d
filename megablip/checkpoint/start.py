"""Whether a folder is one that a stage can start from: a model's export, with all of its weights in place.

What else lies around after a stage looks alike.  Each is refused by its name,
with the command that makes an export of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from megablip.errors import ConfigError

MODEL_TYPE = "megablip"
"""Of the model's config, as Blip3Config has it: read here without transformers."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER = "adapter_config.json"


def check_start(path: str) -> None:
    """Refuse what is not the export of a model; only names of files, and config.json, are looked at.

    Args:
        path: `model.path` of a recipe.

    Raises:
        ConfigError: nothing there; a run or a checkpoint of it; DeepSpeed's files; an adapter without
            its base, or beside a model; another model, such as a bare decoder; no weights.
    """
    folder = Path(path)
    if folder.is_file():
        _refuse(path, "it is a file, not the folder of a model", "name the folder; `megablip convert` makes one")
    config = _model_config(folder)
    if config is None:
        _refuse(path, *_what_else(folder))
    if (folder / _ADAPTER).exists():
        _refuse(
            path,
            "there is an adapter beside the model, and which of the two is meant can't be told",
            "merge it (`megablip convert merge-lora ADAPTER BASE OUTPUT`), or move it elsewhere",
        )
    if config.get("model_type") != MODEL_TYPE:
        _refuse(path, *_other_model(config))
    if not any((folder / name).exists() for name in _WEIGHTS):
        _refuse(path, f"the model has no weights: neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}", "copy or convert it again")


def _model_config(folder: Path) -> dict[str, Any] | None:
    """config.json, of any model; None if there is none."""
    file = folder / "config.json"
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"the model's config can't be read: {error}", where=str(file), remedy="copy or convert the folder again"
        ) from None


def _what_else(folder: Path) -> tuple[str, str]:
    """What a folder without a model's config is, and what to do with it."""
    export = "a stage starts from its export: `megablip convert zero-to-hf {} FOLDER`"
    if (folder / "COMMITTED").exists():
        return "it is a checkpoint of a run", export.format(folder)
    if (folder / "status.json").exists() or (folder / "checkpoints").is_dir():
        return "it is the directory of a run", export.format(folder)
    if (folder / _ADAPTER).exists():
        return (
            "it is an adapter without its base",
            f"merge them first: `megablip convert merge-lora {folder} BASE FOLDER`",
        )
    if any(folder.glob("step_*/COMMITTED")):  # which has a `latest`, as DeepSpeed's folders have
        return "it holds the checkpoints of a run", export.format(folder.parent)
    if any((folder / name).is_file() for name in ("latest", "latest_universal")) or any(folder.glob("*_states.pt")):
        return "it is a checkpoint that DeepSpeed saved", export.format(f"--like MODEL {folder}")
    return (
        "there is no model to start from",
        "make one with `megablip convert init`, or give the folder of an export",
    )


def _other_model(config: dict[str, Any]) -> tuple[str, str]:
    kind = str(config.get("model_type"))
    if kind.lower().startswith("xgen"):
        return "these are released xGen-MM weights", "convert them: `megablip convert xgenmm-to-hf SOURCE FOLDER`"
    return (
        f"it is a model of type '{kind}', not one of megablip",
        "of a bare decoder and a tower `megablip convert init` makes one",
    )


def _refuse(path: str, what: str, remedy: str) -> NoReturn:
    raise ConfigError(what, where=f"model.path: {path}", remedy=remedy)
