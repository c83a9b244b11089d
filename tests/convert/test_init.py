"""The folder that a run starts from."""

from __future__ import annotations

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from megablip.checkpoint.export import ExportReader
from megablip.convert.init import init_model
from megablip.errors import ConfigError
from tests.small_export import SETTINGS, make_ingredients


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    return make_ingredients(tmp_path_factory.mktemp("ingredients"))


def init(ingredients, output, settings=SETTINGS, seed=0, **changes):
    model = output.with_suffix(".yaml")
    model.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    paths = {"tower": ingredients / "tower", "tokenizer": ingredients / "tokenizer", "model": model}
    init_model(output, **paths | changes, seed=seed)
    return output


def test_init_makes_a_folder_that_loads(tmp_path, ingredients):
    output = init(ingredients, tmp_path / "start", seed=5)
    model = AutoModelForImageTextToText.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    tower = load_file(ingredients / "tower" / "model.safetensors")
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, tower[name]), name
    ids = processor(text=["<image>one two"], images=[Image.new("RGB", (16, 9))])["input_ids"]
    assert int(ids.max()) < model.config.text_config.vocab_size
    assert (ids == model.config.image_token_id).sum() % SETTINGS["sampler"]["num_latents"] == 0
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


def test_init_depends_on_its_seed_alone(tmp_path, ingredients):
    hashes = [ExportReader(init(ingredients, tmp_path / str(n), seed=seed)).hash() for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_init_names_what_is_missing(tmp_path, ingredients):
    for what in ("tower", "tokenizer", "model"):
        with pytest.raises(ConfigError, match="does not exist") as caught:
            init(ingredients, tmp_path / what, **{what: tmp_path / "no"})
        assert str(tmp_path / "no") in caught.value.where


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("a: [", "no YAML"),
        ("- 1", "decoder and sampler"),
        (yaml.safe_dump({"decoder": {}, "sampler": {}}), "decoder and sampler"),
        (yaml.safe_dump(SETTINGS | {"decoder": 5}), "decoder and sampler"),
        (yaml.safe_dump(SETTINGS | {"decoder": {"hidden_size": 8}}), "no model"),
        (yaml.safe_dump(SETTINGS | {"decoder": {"model_type": "phi9"}}), "phi9"),
        (yaml.safe_dump(SETTINGS | {"decoder": SETTINGS["decoder"] | {"hidden_size": "x"}}), "hidden_size"),
        (yaml.safe_dump(SETTINGS | {"grids": [[1]]}), "no model"),
    ],
)
def test_init_refuses_settings_that_make_no_model(tmp_path, ingredients, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        init(ingredients, tmp_path / "start", settings)
    assert str(tmp_path / "start.yaml") in caught.value.where
    assert not (tmp_path / "start").exists()
