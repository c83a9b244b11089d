"""The stages after fine-tuning, in real runs: safety counted in epochs, preference tuning with stored scores."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from safetensors.torch import load_file

from megablip.config import load_config
from megablip.metrics.board import read_metrics
from tests.data.builders import write_tar
from tests.data.small import image
from tests.distributed import runs
from tests.preference_stage import PAIRS, make_stage
from tools.reference_scores import score_shards


def safety_recipe(folder):
    """VLGuard's layout beside conversations: 23 and 31 samples; adapters, with the embeddings trained beside them."""
    config = make_stage(folder)
    picture = image(8, 8).data
    harmful = {"safe": False, "instr-resp": [{"instruction": "one two", "response": "three"}]}
    harmless = {
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "one", "response": "two"},
            {"unsafe_instruction": "four", "response": "three"},
        ],
    }
    rows = [(f"g{n}", {"png": picture, "json": json.dumps([harmful, harmless][n % 2]).encode()}) for n in range(23)]
    write_tar(folder / "guard.tar", [{"__key__": key.encode(), **members} for key, members in rows])
    chat = {"conversations": [{"from": "human", "value": "five six"}, {"from": "gpt", "value": "one"}]}
    write_tar(folder / "chat.tar", [{"json": json.dumps(chat).encode()}] * 31)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"stage": "safety", "duration": "3 epochs", "run_dir": str(folder / "safety")}
    recipe["model"]["lora"] = {"rank": 2, "also_train": ["embeddings", "head"]}
    recipe["data"]["sources"] = [
        {"name": "vlguard", "shards": str(folder / "guard.tar"), "schema": "safety", "weight": 23},
        {"name": "sft", "shards": str(folder / "chat.tar"), "schema": "conversation", "weight": 31},
    ]
    recipe["data"]["mixture_unit"] = "documents"
    path = folder / "safety.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, config.model.path


@pytest.mark.slow
def test_safety_tuning_sees_each_sample_three_times_also_when_it_is_cut(tmp_path):
    """About a minute and a half: a run on two ranks that stops, and goes on on one."""
    recipe, start = safety_recipe(tmp_path)
    runs.train(recipe, "stop_after_steps=2", check=75)
    runs.train(recipe, "engine.ranks=1")
    *_, last = read_metrics(tmp_path / "safety")
    assert last["documents_seen"] == 3 * (23 + 31)
    assert last["images_seen"] == 3 * 23
    assert last["epochs_by_source/vlguard"] == last["epochs_by_source/sft"] == 3
    runs.run_python("-m", "megablip.cli", "convert", "zero-to-hf", str(tmp_path / "safety"), str(tmp_path / "tuned"))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (start, tmp_path / "tuned"))
    assert set(before) == set(after), "adapters are merged"
    changed = {name for name in before if not before[name].equal(after[name])}
    layers = {name for name in before if re.search(r"\.layers\..*_proj\.weight$", name) and name.startswith("decoder.")}
    assert changed == layers | {
        "decoder.model.embed_tokens.weight",
        "decoder.lm_head.weight",
        *(name for name in before if name == "decoder.lm_head.bias"),
    }


@pytest.mark.slow
def test_stored_scores_give_the_run_of_the_reference_that_is_asked(tmp_path):
    """About two minutes: a run of two epochs on two ranks twice; the second has its scores from before."""
    make_stage(tmp_path)
    same = {"prompt": "one", "chosen": "two", "rejected": "two"}
    write_tar(tmp_path / "pairs" / "c.tar", [{"__key__": b"same", "json": json.dumps(same).encode()}])
    recipe = tmp_path / "recipe.yaml"
    runs.train(recipe)
    known = [f"run_dir={tmp_path / 'known'}", "preference.stored_reference=true"]
    refused = runs.train(recipe, *known, check=1)
    assert "the shard has no scores of the reference beside it" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert score_shards(load_config(recipe)).startswith(f"{PAIRS} pairs scored")
    runs.train(recipe, *known)
    asked, stored = (read_metrics(tmp_path / name) for name in ("run", "known"))
    assert len(asked) == len(stored) > 2
    for one, other in zip(asked, stored, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["preference/margin"] == pytest.approx(one["preference/margin"], rel=1e-4, abs=1e-6)
        assert "preference/kl" in one
        assert "preference/kl" not in other
    assert {point["data/samples_dropped"] for point in (asked[-1], stored[-1])} == {2}, "the long pair, twice"
    assert asked[-1]["documents_seen"] == 2 * 2 * PAIRS
    [*lines] = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"same"}
    assert all('"chosen" and "rejected" are the same' in line["error"] for line in lines)
