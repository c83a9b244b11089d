"""The folder that a run starts from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from megablip.checkpoint.writer import new_folder
from megablip.errors import ConfigError, MegablipError


def init_model(output: Path, *, tower: Path, tokenizer: Path, model: Path, seed: int) -> None:
    """Write the folder that a run starts from: the tower's weights, the rest random.

    Args:
        tower: folder of a transformers vision model.
        tokenizer: folder of a tokenizer that has the added tokens.
        model: YAML with `decoder` (a transformers config), `sampler`, `grids` and,
            if it is not `released`, `grid_rule`.
        seed: of the random weights.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
    from megablip.model.processor import Blip3Processor
    from megablip.tokens import Tokenizer

    for path in (tower / "config.json", tokenizer / "tokenizer.json", model):
        if not path.exists():
            raise ConfigError("the file does not exist", where=str(path), remedy="check the path")
    settings = _read_settings(model)
    tokens = Tokenizer(tokenizer)
    decoder = dict(settings["decoder"])
    # A row for every id of the tokenizer, made before anything is sharded.
    decoder["vocab_size"] = max(decoder.get("vocab_size", 0), tokens.vocab_size)
    decoder |= {"pad_token_id": tokens.pad_id, "bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id}
    torch.manual_seed(seed)
    try:
        config = Blip3Config(
            text_config=AutoConfig.for_model(decoder.pop("model_type", None), **decoder),
            vision_config=AutoConfig.from_pretrained(tower),
            sampler=settings["sampler"],
            grids=settings["grids"],
            grid_rule=settings["grid_rule"],
            image_token_id=tokens.image_id,
            pad_token_id=tokens.pad_id,
        )
        built = Blip3ForConditionalGeneration(config)
        layout = asdict(config.layout)
    except MegablipError:
        raise
    except Exception as error:  # transformers and torch raise all kinds for sizes that don't fit
        raise ConfigError(
            f"these settings make no model: {error}", where=f"{model}, {tower}", remedy="mend the settings"
        ) from error
    built.vision_tower.load_state_dict(AutoModel.from_pretrained(tower).state_dict())
    with new_folder(output) as staging:
        built.save_pretrained(staging)
        Blip3Processor(AutoTokenizer.from_pretrained(tokenizer), **layout).save_pretrained(staging)
    print(f"wrote {output}: {sum(p.numel() for p in built.parameters()):,} parameters")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the file is no YAML: {error}", where=str(path)) from None
    kinds = {"grid_rule": str, "decoder": dict, "sampler": dict, "grids": list}
    settings = {"grid_rule": "released"} | settings if isinstance(settings, dict) else {}
    if {key: type(value) for key, value in settings.items()} != kinds:
        raise ConfigError("the file needs the mappings decoder and sampler and the list grids", where=str(path))
    return settings
