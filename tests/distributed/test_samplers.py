"""Each kind of sampler in real runs, with conversations about images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from megablip.metrics.points import read_metrics
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.model.samplers import SAMPLERS
from tests.data.builders import write_tar
from tests.distributed import runs

pytestmark = pytest.mark.slow

_PERCEIVER = {"depth": 1, "heads": 2, "dim_head": 16, "num_latents": 4, "ff_mult": 2}
SETTINGS = {
    "perceiver": _PERCEIVER,
    "fixed": _PERCEIVER,
    "instruct": _PERCEIVER,
    "qformer": {"depth": 2, "heads": 2, "dim_head": 16, "num_queries": 4, "ff_mult": 2},
    "mlp": {},
}


@pytest.fixture(scope="module")
def chats(work) -> Path:
    """Shards of conversations, one in three about an image; a tokenizer for them; a model of each kind."""
    folder = work / "chats"
    rng = np.random.default_rng(1)
    runs.run_python("-m", "tokenization", "train", "--input", str(work / "corpus.txt"), "--vocab-size", "300",
                    "--chat", "--out", str(folder / "tokenizer"))  # fmt: skip
    sentences = (work / "corpus.txt").read_text().splitlines()
    for shard in range(3):
        members = []
        for number in range(20):
            question, answer = sentences[20 * shard + number], sentences[60 + 20 * shard + number]
            seen = number % 3 == 0
            turns = [{"from": "human", "value": "<image>\n" * seen + question}, {"from": "gpt", "value": answer}]
            members.append(
                {"__key__": b"%d-%d" % (shard, number), "json": json.dumps({"conversations": turns}).encode()}
            )
            if seen:
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(image, "PNG")
                members[-1]["png"] = image.getvalue()
        write_tar(folder / "data" / f"chat-{shard}.tar", members)
    for kind, settings in SETTINGS.items():
        model = runs.MODEL | {"sampler": {"kind": kind} | settings}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(model))
        runs.run_python("-m", "megablip.cli", "convert", "init", str(folder / kind), "--tower", str(work / "tower"),
                        "--tokenizer", str(folder / "tokenizer"), "--model", str(folder / f"{kind}.yaml"))  # fmt: skip
    return folder


def recipe_of(chats: Path, kind: str, name: str, **changes) -> Path:
    source = {"name": "chat", "shards": str(chats / "data" / "chat-*.tar"), "schema": "conversation", "weight": 1}
    changes = {
        "stage": "sft",
        "run_dir": str(chats / name),
        "duration": "6 steps",
        "model__path": str(chats / kind),
        "data__sources": [source],
        "data__sequence_length": 64,
        "engine__precision": "fp32",
    } | changes
    return runs.make_recipe(chats, **changes)


def test_every_kind_is_tested():
    assert set(SETTINGS) == set(SAMPLERS)


@pytest.mark.parametrize("kind", SETTINGS)
def test_two_ranks_train_as_one_and_as_a_run_that_stopped(chats, kind):
    """ZeRO-3; in some steps a rank has an image and the other none."""
    runs.train(recipe_of(chats, kind, f"{kind}-2"), "stop_after_steps=3", check=75)
    runs.train(recipe_of(chats, kind, f"{kind}-2"))
    runs.train(recipe_of(chats, kind, f"{kind}-1", engine__ranks=1))
    found, expected = runs.losses(chats / f"{kind}-2"), runs.losses(chats / f"{kind}-1")
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    points = read_metrics(chats / f"{kind}-2")
    assert any(point["images_by_source/chat"] > 0 for point in points), sorted(points[0])

    export = chats / f"{kind}-export"
    runs.run_python("-m", "megablip.cli", "convert", "zero-to-hf", str(chats / f"{kind}-2"), str(export))
    began, written = load_file(chats / kind / "model.safetensors"), load_file(export / "model.safetensors")
    moved = {name for name, value in written.items() if not torch.equal(value, began[name])}
    assert {name.split(".")[0] for name in moved} == {"sampler", "decoder"}
    loaded = Blip3ForConditionalGeneration.from_pretrained(export)
    assert loaded.config.sampler["kind"] == kind
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, written[name]), name


def test_a_run_does_not_go_on_with_another_kind(chats):
    """The weights have the same names; the kind in config.json is what tells them apart."""
    runs.train(recipe_of(chats, "fixed", "refused"), "stop_after_steps=1", check=75)
    config, other = chats / "fixed" / "config.json", json.loads((chats / "perceiver" / "config.json").read_text())
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {key: other[key] for key in ("sampler", "visual_tokens")}))
    done = runs.train(recipe_of(chats, "fixed", "refused"), check=1)
    assert "perceiver" in done.stderr
    assert "fixed" in done.stderr
    config.write_text(kept)
