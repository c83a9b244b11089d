"""Real runs in deterministic mode, through the launcher: cut and resumed equals one piece, bit for bit."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from megablip.checkpoint.commit import newest_committed, open_checkpoint
from megablip.checkpoint.slices import SliceReader
from megablip.config import dump_config
from megablip.convert.init import init_model
from megablip.doctor.result import Place, Result
from megablip.doctor.synthetic import run_config
from megablip.errors import MegablipError
from megablip.launch import launch
from megablip.metrics.points import read_metrics
from megablip.records import MASTER, MOMENTS
from megablip.tokens import PAD_TOKEN, VISION_TOKENS

STEPS, CUT_AT = 8, 3
REMEDY = "a run that was interrupted is not the same run: see the logs, report this with doctor.json"
_BOS, _EOS = "<s>", "</s>"

# Heads of 64, so that a GPU's attention kernels take them.
_MODEL = {
    "decoder": {
        "model_type": "phi3", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
    "sampler": {"depth": 1, "heads": 2, "dim_head": 64, "num_latents": 4, "ff_mult": 2},
    "grids": [[1, 2], [2, 1]],
}  # fmt: skip
_TOWER = {
    "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 192, "image_size": 32,
    "patch_size": 8, "vision_use_head": False,
}  # fmt: skip


def check(place: Place) -> Iterator[Result]:
    make_start(place.folder)
    make_shards(place.folder / "data")
    yield Result("start", "a tiny model and shards of captions and text were made")
    whole, cut = place.folder / "whole", place.folder / "cut"
    for run_dir, overrides, expected in (
        (whole, [], 0),
        (cut, [f"stop_after_steps={CUT_AT}"], 75),
        (cut, [], 0),
    ):
        recipe = run_config(
            place.folder,
            run_dir=str(run_dir),
            duration=f"{STEPS} steps",
            deterministic=True,
            data={
                "sources": [
                    {
                        "name": schema,
                        "shards": str(place.folder / "data" / f"{schema}.tar"),
                        "schema": schema,
                        "weight": 1,
                    }
                    for schema in ("caption", "text")
                ],
                "sequence_length": 256,
                "max_tiles": 16,
                "packing_buffer": 8,
            },
            batch={"lanes": 4, "micro_batch_sequences": 2},
        )
        path = place.folder / "recipe.yaml"
        path.write_text(dump_config(recipe))
        code = launch(path, overrides)
        name = f"{run_dir.name} run{' of ' + overrides[0] if overrides else ''}"
        yield Result(name, f"exit code of `megablip train`, {expected} is right", abs(code - expected), tolerance=0,
                     remedy=REMEDY)  # fmt: skip
        if code != expected:
            reason = json.loads((run_dir / "status.json").read_text())["attempts"][-1].get("reason", "")
            raise MegablipError(f"the run failed: {reason}", where=str(run_dir))
    losses, resumed = ([point["loss"] for point in read_metrics(run_dir)] for run_dir in (whole, cut))
    differing = sum(a != b for a, b in zip(losses, resumed, strict=True))
    yield Result("losses", f"steps of {STEPS} whose loss differs in a bit", differing, tolerance=0, remedy=REMEDY)
    yield Result(
        "loss", "of the last step, as a share of the first", losses[-1] / losses[0], tolerance=0.999, remedy=REMEDY
    )
    yield Result(
        "weights and moments", "tensors that differ in a bit at the end", _differing_tensors(whole, cut),
        tolerance=0, remedy=REMEDY,
    )  # fmt: skip


def make_start(folder: Path) -> None:
    """folder/start: a model with random weights and a tokenizer of bytes."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    alphabet = [_BOS, _EOS, PAD_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([_BOS, _EOS, PAD_TOKEN, *VISION_TOKENS])
    made.save(str(tokenizer / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS, "eos_token": _EOS, "pad_token": PAD_TOKEN}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
    SiglipVisionModel(SiglipVisionConfig(**_TOWER)).save_pretrained(folder / "tower")
    (folder / "model.yaml").write_text(yaml.safe_dump(_MODEL))
    init_model(folder / "start", tower=folder / "tower", tokenizer=tokenizer, model=folder / "model.yaml", seed=0)


def make_shards(folder: Path) -> None:
    """A tar of images with captions, and one of text."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "large", "small", "round", "square", "near", "far", "old"]
    for schema in ("caption", "text"):
        with tarfile.open(folder / f"{schema}.tar", "w") as tar:
            for number in range(64):
                members = {"txt": " ".join(rng.choice(words, rng.integers(2, 12))).encode()}
                if schema == "caption":
                    members["png"] = _png(rng)
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def _png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _differing_tensors(one: Path, other: Path) -> int:
    folders = [newest_committed(run_dir) for run_dir in (one, other)]
    for folder in folders:
        open_checkpoint(folder)  # verifies it
    a, b = (SliceReader(folder) for folder in folders)
    names = a.parameters.keys() | b.parameters.keys()
    return sum(
        not np.array_equal(a.whole(name, kind).numpy(), b.whole(name, kind).numpy())
        for name in names
        for kind in (MASTER, *MOMENTS)
    )
