"""Adapters merged as peft merges them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Phi3Config, Phi3ForCausalLM
from typer.testing import CliRunner

from megablip.checkpoint import writer
from megablip.cli import app
from megablip.config import LoraConfig as OwnLoraConfig
from megablip.convert import sources
from megablip.convert.lora import merge_lora
from megablip.convert.to_hf import zero_to_hf
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.model.lora import add_lora
from tests.convert.test_to_hf import make_run
from tests.model.tiny import tiny_config, tiny_model
from tests.small_export import SETTINGS

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = {key: value for key, value in SETTINGS["decoder"].items() if key != "model_type"}
    config = Phi3Config(**sizes | {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1})
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base, folder, **settings):
    """A folder of peft's with random adapters."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 8} | settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": FUSED},
        {"target_modules": FUSED, "use_rslora": True},
        {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": FUSED, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"mlp.down_proj": 3}},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
    ids=["fused", "rslora", "modules_to_save", "patterns", "embeddings"],
)
def test_merging_is_pefts(tmp_path, base, settings, monkeypatch):
    folder = adapter(base, tmp_path / "adapter", **settings)
    monkeypatch.setattr(sources, "CHUNK", 37)  # parts of rows
    monkeypatch.setattr(writer, "CHUNK", 37)
    merge_lora(folder, base, tmp_path / "merged")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    merged, before = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), load_file(base / "model.safetensors")
    changed = 0
    for name, value in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), value, atol=1e-5, rtol=1e-5)
        changed += not torch.equal(value, before[name])
    assert changed


@pytest.mark.parametrize("parts", [[], ["sampler", "embeddings", "head"]])
def test_a_checkpoint_with_adapters_becomes_the_merged_model(tmp_path, parts):
    start = tmp_path / "start"
    tiny_model().save_pretrained(start)
    (start / "tokenizer.json").write_text("{}")
    lora = {"rank": 4, "alpha": 8.0, "also_train": parts}
    model = Blip3ForConditionalGeneration(tiny_config(), with_vision_tower=False)
    add_lora(model, OwnLoraConfig(**lora))
    generator = torch.Generator().manual_seed(0)
    trained = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    zero_to_hf(make_run(tmp_path / "run", start, trained, lora=lora), tmp_path / "out")
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(start / "model.safetensors")
    assert set(written) == set(before)
    touched = set()
    for name, value in written.items():
        a = trained.get(name.removesuffix("weight") + "lora_A.default.weight")
        if a is not None:
            touched.add(name)
            b = trained[name.removesuffix("weight") + "lora_B.default.weight"]
            torch.testing.assert_close(value, before[name] + 2 * (b @ a), atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(value, trained.get(name, before[name])), name
            assert name in trained or not name.startswith("sampler.") or not parts
    assert touched
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_an_adapter_that_names_another_base_is_refused(tmp_path, base):
    folder = adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(base)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "someone/another-model"}))
    with pytest.raises(ConfigError, match="made for someone/another-model") as caught:
        merge_lora(folder, base, tmp_path / "out")
    assert "--any-base" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    arguments = ["convert", "merge-lora", str(folder), str(base), str(tmp_path / "out"), "--any-base"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for number, named in enumerate(["", None, f"elsewhere/{base.name}/"]):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        merge_lora(folder, base, tmp_path / f"out{number}")
    (tmp_path / "link").symlink_to(base)
    merge_lora(folder, tmp_path / "link", tmp_path / "linked")


def test_what_is_not_w_plus_ba_is_refused(tmp_path, base):
    folder = adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (
        ({"use_dora": True}, "uses use_dora"),
        ({"peft_type": "IA3"}, "uses IA3"),
        ({"lora_alpha": "x"}, "config can't be read"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=words):
            merge_lora(folder, base, tmp_path / "out")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(iter(weights))
    for changed, words in (
        ({first: weights[first]}, "has lora_[AB]"),
        ({name: value[:, :3].clone() for name, value in weights.items()}, "matrices"),
        ({name: torch.zeros(4, 4) for name in weights}, r"o_proj\.weight \(4, 4\), which is \(16, 16\)"),
        ({name.replace("layers.0", "layers.9"): value for name, value in weights.items()}, "which the base lacks"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            merge_lora(folder, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
