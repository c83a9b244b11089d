"""A model's visual layout and its ids, read from its folder without torch or transformers.

Data workers need only this much of a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megablip.errors import ConfigError
from megablip.records import VisualLayout
from megablip.tokens import Tokenizer

if TYPE_CHECKING:
    from megablip.config import ModelConfig


def read_layout(model: ModelConfig) -> VisualLayout:
    """The layout of a run's model: that of its folder, with the run's own grids if it has any.

    Raises:
        ConfigError: no readable config.json, or not the one of a megablip model.
    """
    with _config(model) as config:
        layout = layout_from_config(config)
    return layout if model.grids is None else replace(layout, grids=tuple(model.grids))


def check_tokenizer(model: ModelConfig) -> None:
    """Compare the ids of the folder's tokenizer with the rows of its model.

    Raises:
        ConfigError: a token that the model has no row for, or another id of `<image>`; no readable folder.
    """
    tokenizer = Tokenizer(model.path)
    with _config(model) as config:
        rows, image_id = int(config["text_config"]["vocab_size"]), int(config["image_token_id"])
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the decoder {rows} rows of embeddings",
            where=model.path,
            remedy="make the model with this tokenizer: `megablip convert init` adds the rows",
        )
    if tokenizer.image_id != image_id:
        raise ConfigError(
            f"<image> is {tokenizer.image_id} for the tokenizer and {image_id} for the model",
            where=model.path,
            remedy="take the tokenizer that the model was made with, or mend image_token_id in config.json",
        )


@contextmanager
def _config(model: ModelConfig) -> Iterator[Any]:
    """A model folder's config.json, with errors for what is no config of a megablip model."""
    path = Path(model.path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config can't be read: {error}",
            where=str(path),
            remedy="name a folder written by save_pretrained or `megablip convert`",
        ) from None
    try:
        yield config
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this is no config of a megablip model: {type(error).__name__} {error}",
            where=str(path),
            remedy="convert the model first with `megablip convert`",
        ) from None


def layout_from_config(config: Mapping[str, Any]) -> VisualLayout:
    """The layout that a model config, as the mapping in its JSON file, describes."""
    return VisualLayout(
        tile_size=int(config["vision_config"]["image_size"]),
        patch_size=int(config["vision_config"]["patch_size"]),
        tokens_per_tile=int(config["visual_tokens"]["per_tile"]),
        grids=tuple(_grid(*grid) for grid in config["grids"]),
        grid_rule=_grid_rule(config.get("grid_rule", "released")),
        tokens_per_image=int(config["visual_tokens"]["per_image"]),
    )


def _grid(columns: int, rows: int) -> tuple[int, int]:
    if int(columns) < 1 or int(rows) < 1:
        raise ValueError(f"grids: ({columns}, {rows}) has no tile")
    return int(columns), int(rows)


def _grid_rule(name: str) -> Literal["released", "paper"]:
    if name not in ("released", "paper"):
        raise ValueError(f"grid_rule: '{name}' is neither 'released' nor 'paper'")
    return name
