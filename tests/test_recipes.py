"""Every configuration that is shipped loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import AutoConfig, SiglipVisionConfig

from megablip.config import EngineConfig, load_config
from megablip.convert.init import _read_settings
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import Topology
from megablip.errors import ConfigError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration

REPOSITORY = Path(__file__).parents[1]
YAMLS = sorted((REPOSITORY / "megablip" / "recipes").rglob("*.yaml"))
RECIPES = [path for path in YAMLS if "stage" in yaml.safe_load(path.read_text())]
MODELS = [path for path in YAMLS if path not in RECIPES]
DS_CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ZERO3 = REPOSITORY / "ds_configs" / "zero3.json"
ALONE = Topology(0, 1, 0, torch.device("cpu"))


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_there_are_some():
    assert RECIPES
    assert MODELS
    assert DS_CONFIGS


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_a_recipe_loads(path):
    config = load_config(path)
    complete_ds_config(config.engine, config.optimizer.clip_norm, 1, ALONE)


def test_the_mixtures_are_the_published_ones():
    weights = {
        name: {
            source.name: source.weight for source in load_config(REPOSITORY / "megablip/recipes" / name).data.sources
        }
        for name in ("pretrain.yaml", "pretrain_highres.yaml")
    }
    first, second = weights["pretrain.yaml"], weights["pretrain_highres.yaml"]
    assert sum(first.values()) == 100
    assert sum(second.values()) == 90  # as published
    for stage in (first, second):
        assert stage["mint_html"] + stage["mint_pdf"] + stage["mint_arxiv"] == 32.5
        assert (stage["mint_html"] / 7, stage["mint_pdf"] / 5) == (2.5, 2.5) == (stage["mint_arxiv"],) * 2


@pytest.mark.parametrize("path", MODELS, ids=ids)
def test_a_model_is_built(path):
    settings = _read_settings(path)
    decoder = dict(settings["decoder"])
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = Blip3Config(
        text_config=AutoConfig.for_model(decoder.pop("model_type"), vocab_size=512, pad_token_id=3, **decoder),
        vision_config=tower,
        sampler=settings["sampler"],
        grids=settings["grids"],
        image_token_id=511,
        pad_token_id=3,
    )
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(config)
    assert config.layout.tokens_per_tile == settings["sampler"]["num_latents"]
    assert [list(grid) for grid in config.layout.grids] == settings["grids"]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("path", "precision"),
    [
        (path, precision)
        for path in DS_CONFIGS
        for precision in ("bf16", "fp32")
        if (path.stem, precision) != ("zero0", "bf16")  # refused, see below
    ],
)
def test_deepspeed_accepts_its_config(path, precision, device):
    engine = EngineConfig(ds_config=path.stem, precision=precision)
    completed = complete_ds_config(engine, 0.5, 3, Topology(0, 8, 0, torch.device(device), ranks_per_node=4))
    assert "auto" not in str(completed)
    read = DeepSpeedConfig(completed)
    assert str(int(read.zero_config.stage)) == path.stem.removeprefix("zero")[0]
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.bfloat16_config.check_grad_overflow
    assert read.grad_accum_dtype == "fp32"
    assert read.gradient_accumulation_steps == 3
    assert read.gradient_clipping == 0.5
    assert read.train_micro_batch_size_per_gpu == 1
    assert not read.timers_config.enabled, "it makes the host wait for the GPU twice a micro-batch"
    assert read.zero_config.overlap_comm == (device == "cuda")
    assert read.zero_config.zero_hpz_partition_size == (4 if path.stem == "zero3_hpz" else 1)


def test_an_own_ds_config_keeps_what_it_sets(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(ZERO3.read_text().replace('"overlap_comm": "auto"', '"overlap_comm": true'))
    completed = complete_ds_config(EngineConfig(ds_config=str(path)), 1.0, 1, ALONE)
    assert completed["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ('{"bf16": {}, "zero_optimization": {"stage": 4}}', "no ZeRO stage 4"),
        ("{}", "lacks the sections"),
        ("[]", "lacks the sections"),
        (None, "does not exist"),
    ],
)
def test_an_own_ds_config_that_is_wrong_is_refused(tmp_path, content, words):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        complete_ds_config(EngineConfig(ds_config=str(path)), 1.0, 1, ALONE)
    assert str(path) in caught.value.where


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="does not exist") as caught:
        complete_ds_config(EngineConfig(ds_config="zero9"), 1.0, 1, ALONE)
    assert "zero3" in caught.value.remedy


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "gradient_clipping"])
def test_a_value_that_contradicts_the_recipe_is_refused(tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(ZERO3.read_text()) | {key: 7}))
    with pytest.raises(ConfigError, match=f"{key} is 7, megablip makes it"):
        complete_ds_config(EngineConfig(ds_config=str(path)), 1.0, 2, ALONE)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fp16", {"enabled": True}, "use bf16"),
        ("scheduler", {}, "the recipe's section"),
        ("wobble", 1, "not known here"),
        ("zero_optimization.stage", 0, "adds gradients up in bf16"),
        ("zero_optimization.mics_shard_size", 2, "DeepSpeed has removed MiCS"),
        ("zero_optimization.offload_param", {"device": "cpu"}, "offload_param is not supported"),
        ("zero_optimization.offload_optimizer", {"device": "nvme"}, "offloaded to nvme"),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}, "ratio is not supported"),
        ("zero_optimization.zero_quantized_gradients", True, "resume is not exact"),
        ("zero_optimization.zero_hpz_partition_size", 4, "6 ranks can't be cut into groups"),
        ("zero_optimization.zero_hpz_partition_size", 0, "can't be cut into groups"),
        ("zero_optimization.offload_optimizer", "cpu", "is no section"),
        ("data_types.grad_accum_dtype", "bf16", "grad_accum_dtype is bf16, megablip makes it fp32"),
        ("bf16.check_grad_overflow", False, "check_grad_overflow is False"),
    ],
)
def test_what_cannot_be_made_right_is_refused_with_the_reason(tmp_path, key, value, words):
    ds_config = json.loads(ZERO3.read_text())
    *parents, leaf = key.split(".")
    section = ds_config[parents[0]] if parents else ds_config
    section[leaf] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ds_config))
    with pytest.raises(ConfigError, match=words):
        complete_ds_config(EngineConfig(ds_config=str(path)), 1.0, 1, Topology(0, 6, 0, torch.device("cpu")))


def test_compiled_blocks_are_refused_with_stage_3():
    with pytest.raises(ConfigError, match="compile_blocks gains nothing with ZeRO stage 3"):
        complete_ds_config(EngineConfig(ds_config="zero3", compile_blocks=True), 1.0, 1, ALONE)
    complete_ds_config(EngineConfig(ds_config="zero2", compile_blocks=True), 1.0, 1, ALONE)


@pytest.mark.parametrize("key", ["offload_optimizer", "zero_hpz_partition_size"])
def test_what_belongs_to_stage_3_is_refused_elsewhere(tmp_path, key):
    ds_config = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    ds_config["zero_optimization"][key] = {"device": "cpu"} if key == "offload_optimizer" else 2
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ds_config))
    with pytest.raises(ConfigError, match="ZeRO stage 2"):
        complete_ds_config(EngineConfig(ds_config=str(path)), 1.0, 1, ALONE)


MARK = re.compile(r"#.*\[(paper|code|ours|silkie)\b")
NO_CHOICE = {"stage", "run_dir", "seed", "path", "name", "shards", "schema", "ranks"}
"""Keys whose values say what and where, not how."""


def unmarked(path: Path) -> list[str]:
    """The values without a source: neither behind nor right above them, or a key that they stand under."""
    lines = path.read_text().splitlines()

    def is_marked(line: int) -> bool:
        above = line
        while above and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        return any(MARK.search(text) for text in lines[above : line + 1])

    def walk(node: yaml.Node, key: str) -> list[str]:
        if isinstance(node, yaml.MappingNode):
            pairs = [(name, value) for name, value in node.value if name.value not in NO_CHOICE]
            below = [(name.start_mark.line, value, f"{key}.{name.value}") for name, value in pairs]
        elif isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
            below = [(item.start_mark.line, item, f"{key}.{number}") for number, item in enumerate(node.value)]
        else:
            return [key]
        return [name for line, value, inner in below if not is_marked(line) for name in walk(value, inner)]

    return walk(yaml.compose(path.read_text()), path.name)


FULL_SIZE = [path for path in RECIPES if path.parent.name == "recipes"]


@pytest.mark.parametrize("path", FULL_SIZE, ids=ids)
def test_every_value_at_full_size_says_where_it_is_from(path):
    assert unmarked(path) == []


def test_a_value_without_a_source_is_found(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "a: 1 # [ours]\nb: {c: 2, path: x}\nd: # [code]\n  e: 3\nf:\n  # [paper]\n  - {g: 4}\n  - {h: 5}\n"
    )
    assert unmarked(recipe) == ["r.yaml.b.c", "r.yaml.f.1.h"]


def test_every_stage_has_a_recipe_and_a_twin_in_miniature():
    stages = {path.stem for path in FULL_SIZE}
    assert stages == {"pretrain", "pretrain_highres", "sft", "interleave", "dpo", "safety", "sft_lora"}
    mini = {path.stem for path in RECIPES if path.parent.name == "mini"}
    assert {"pretrain", "sft", "interleave", "dpo", "safety"} <= mini
