"""Checkpoints to Hugging Face folders, and the folder a run starts from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import save_file

from megablip.checkpoint.commit import newest_committed, open_checkpoint
from megablip.checkpoint.export import VISION_TOWER, ExportReader
from megablip.checkpoint.slices import SliceReader
from megablip.config import load_config
from megablip.errors import CheckpointError, ConfigError, MegablipError
from megablip.records import MASTER

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9  # what transformers writes by default


def zero_to_hf(source: Path, output: Path, dtype: str = "fp32") -> None:
    """Write a committed checkpoint as a folder that `from_pretrained` loads.

    The trained weights come from the ranks' files, the frozen ones (the tower's,
    or of a trained tower its pooling head), the config, tokenizer and processor
    from the export that the run began with.

    Args:
        source: a run directory (its newest checkpoint) or one checkpoint's folder.
        dtype: fp32, bf16 or fp16; the masters are fp32.

    Raises:
        CheckpointError: nothing committed, a damaged file, or weights that
            don't fit the model.
        ConfigError: unknown dtype, or `output` exists.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'", where="--dtype", remedy=f"one of {', '.join(DTYPES)}")
    source = source.resolve()
    folder = source if (source / "COMMITTED").exists() else newest_committed(source)
    checkpoint = open_checkpoint(folder)
    model = load_config(folder.parents[1] / "config.yaml").model
    start = Path(model.path)
    base = ExportReader(start)
    if base.hash() != checkpoint.trainer_state["base"]["model"]:
        raise CheckpointError(
            "the frozen weights are no longer those the run began with",
            where=str(start),
            remedy="restore the folder; its hash stands in trainer_state.json",
        )
    trained = SliceReader(folder)
    frozen = f"{VISION_TOWER}.head." if model.train_tower else f"{VISION_TOWER}."
    expected = {name for name in base.names if not name.startswith(frozen)}
    if expected != set(trained.parameters):
        difference = sorted(expected ^ set(trained.parameters))
        raise CheckpointError(
            f"the checkpoint and the model differ in {len(difference)} weights, for example {difference[0]}",
            where=f"{folder}, {start}",
        )

    def weight(name: str) -> torch.Tensor:
        if name in trained.parameters:
            return trained.whole(name, MASTER)
        shape = base.shape(name)
        return base.read(name, MASTER, shape, 0, math.prod(shape)).view(shape)

    shapes = {name: base.shape(name) for name in base.names}
    with _atomic_folder(output) as staging:
        for path in start.iterdir():
            if path.suffix in (".json", ".model", ".jinja") and not path.name.startswith("model."):
                shutil.copy(path, staging)
        grids = {} if model.grids is None else {"grids": model.grids}
        _update_json(staging / "config.json", {"dtype": str(DTYPES[dtype]).removeprefix("torch."), **grids})
        if (staging / "processor_config.json").exists():
            _update_json(staging / "processor_config.json", grids)
        _write_weights(staging, shapes, weight, DTYPES[dtype])
    print(f"wrote {output} from {folder.name}")


def _update_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


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
    with _atomic_folder(output) as staging:
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


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], weight: Any, dtype: torch.dtype) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("converting", total=len(shapes))
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = weight(name).to(dtype)
                progress.advance(task)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@contextmanager
def _atomic_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole.

    Raises:
        ConfigError: `output` is there already.
        CheckpointError: it can't be written.
    """
    if output.exists():
        raise ConfigError("the output exists already", where=str(output), remedy="remove it or choose another folder")
    staging = output.with_name(output.name + ".tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        os.rename(staging, output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the folder can't be written: {error}", where=str(output), remedy="free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
