"""`megablip convert import-zero`: a run that was begun elsewhere goes on here."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from megablip.checkpoint.deepspeed_files import read_zero
from megablip.config import Config, load_config
from megablip.convert.import_zero import import_zero
from megablip.data.loader import setup_of
from megablip.data.samples import index_sources, untouched_states
from megablip.launch import prepare_run
from megablip.model.blip3 import Blip3Config
from megablip.train import build_trained


def take_over(
    source: Path,
    recipe: Path,
    overrides: list[str],
    *,
    tokens: int | None,
    strip_prefix: str,
    allow_changes: bool,
) -> None:
    """Make a DeepSpeed checkpoint the newest of the run that a recipe describes. Arguments as of `import_zero`.

    Raises:
        ConfigError, ShardError: the recipe is of no use.
        CheckpointError: the checkpoint is none, or of another model.
    """
    config = load_config(recipe, overrides)
    state = read_zero(source).without_prefix(strip_prefix)
    prepare_run(config)
    index_sources(config.data)
    model_config = Blip3Config.of_run(config.model)
    setup = setup_of(config, config.model.path, model_config.layout, range(config.batch.lanes), None, 0)
    folder = import_zero(
        state,
        config,
        _trained_shapes(model_config, config),
        untouched_states(setup, state.step),
        tokens=tokens,
        allow_changes=allow_changes,
    )
    print(f"wrote {folder}; `megablip train {recipe}` goes on from it, with its data from their beginning")


def _trained_shapes(model_config: Blip3Config, config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), no_init_weights():
        model = build_trained(model_config, config)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
