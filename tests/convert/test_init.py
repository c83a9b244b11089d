"""The folder that a run starts from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Phi3Config,
    Phi3ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from megablip.chat import end_ids
from megablip.checkpoint.export import ExportReader
from megablip.convert.init import init_model
from megablip.data.encode import Encoder
from megablip.errors import CheckpointError, ConfigError
from megablip.records import Document, Text
from megablip.tokens import Tokenizer
from tests.convert.test_xgenmm import fake_phi3_tokenizer
from tests.data.small import PHI3_TEMPLATES, write_phi3_tokenizer
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
    assert model.generation_config.eos_token_id == end_ids(Tokenizer(output), output)


@pytest.mark.parametrize("form", PHI3_TEMPLATES)
def test_init_leaves_phi3s_tokenizer_as_it_is(tmp_path, ingredients, form):
    """The class that its config names would be read by transformers without the space before each text."""
    folder = write_phi3_tokenizer(tmp_path / "phi3", PHI3_TEMPLATES[form])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    output = init(ingredients, tmp_path / "start", tokenizer=folder)
    made, given = (json.loads((path / "tokenizer.json").read_text()) for path in (output, folder))
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder"):
        assert made[part] == given[part], part
    processor = AutoProcessor.from_pretrained(output)
    encoder = Encoder(str(output), processor.layout)
    asked = processor.apply_chat_template(
        [{"role": "user", "content": "a dog"}], tokenize=True, add_generation_prompt=True
    )
    prompt = Document((Text("a dog", loss=False, role="user"),), "source", "key")
    assert asked[0].tolist() == encoder.encode_prompt(prompt).input_ids.tolist()
    names = ["<s>", "<|user|>", "▁a", "▁", *"dog", "<|end|>", "<|assistant|>"]
    assert processor.tokenizer.convert_ids_to_tokens(asked[0]) == names


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


ROWS, KNOWN = 64, 40  # of the decoder's tables, and ids of its own tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder with its tokenizer, which has none of our tokens, and a whole SigLIP model."""
    folder = tmp_path_factory.mktemp("parts")
    fake_phi3_tokenizer(folder / "phi3", KNOWN)
    sizes = SETTINGS["decoder"] | {"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    phi3 = Phi3ForCausalLM(Phi3Config(**{k: v for k, v in sizes.items() if k != "model_type"}))
    phi3.save_pretrained(folder / "phi3")
    vision = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    SiglipModel(
        SiglipConfig(text_config=vision | {"vocab_size": 9, "projection_size": 8}, vision_config=vision)
    ).save_pretrained(folder / "siglip")
    (folder / "model.yaml").write_text(
        yaml.safe_dump({key: SETTINGS[key] for key in ("sampler", "grids")} | {"tile_layout": "released"})
    )
    return folder


def from_parts(parts, output, **changes):
    given = {"tower": parts / "siglip", "decoder": parts / "phi3", "model": parts / "model.yaml"}
    init_model(output, **given | changes)
    return output


def test_init_from_given_parts_keeps_their_weights(tmp_path, parts):
    output = from_parts(parts, tmp_path / "start")
    model, processor = AutoModelForImageTextToText.from_pretrained(output), AutoProcessor.from_pretrained(output)
    phi3, siglip = Phi3ForCausalLM.from_pretrained(parts / "phi3"), SiglipModel.from_pretrained(parts / "siglip")
    for name, value in siglip.vision_model.named_parameters():
        assert torch.equal(model.vision_tower.get_parameter(name), value), name
    for name, value in phi3.named_parameters():
        own = model.decoder.get_parameter(name)
        if value.shape[0] != ROWS:
            assert torch.equal(own, value), name
            continue
        assert own.shape == value.shape
        added = slice(KNOWN, KNOWN + 4)
        assert torch.equal(own[:KNOWN], value[:KNOWN])
        assert torch.equal(own[KNOWN + 4 :], value[KNOWN + 4 :])  # rows that stay spare
        mean, deviation = value[:KNOWN].mean(0), value[:KNOWN].std(0)
        assert ((own[added] - mean).abs() < 0.6 * deviation).all()
        assert own[added].unique(dim=0).shape[0] == 4
    assert not model.decoder.lm_head.bias.any()
    assert processor.tokenizer.convert_tokens_to_ids(["<pad>", "<image>"]) == [KNOWN, KNOWN + 1]
    assert model.config.image_token_id == KNOWN + 1
    assert model.config.tile_layout == "released"
    ids = torch.tensor([[0, 5, 9, 2]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, phi3(ids).logits
    torch.testing.assert_close(ours[..., :KNOWN], theirs[..., :KNOWN])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.5 < model.sampler.latents.std() < 2


def test_more_tokens_than_rows_make_rows(tmp_path, parts):
    tokenizer = fake_phi3_tokenizer(tmp_path / "wide", ROWS + 7)
    output = from_parts(parts, tmp_path / "start", tokenizer=tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(output)
    before = Phi3ForCausalLM.from_pretrained(parts / "phi3").model.embed_tokens.weight
    after = model.get_input_embeddings().weight
    assert len(after) == ROWS + 7 + 4
    assert torch.equal(after[:KNOWN], before[:KNOWN])
    assert not torch.equal(after[KNOWN:ROWS], before[KNOWN:ROWS])


def test_init_from_parts_depends_on_its_seed_and_keeps_the_dtype(tmp_path, parts):
    folders = [from_parts(parts, tmp_path / str(n), seed=seed, dtype="bf16") for n, seed in enumerate((1, 1, 2))]
    hashes = [ExportReader(folder).hash() for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(ExportReader(folders[0]).dtypes.values()) == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(folders[0], dtype="auto").dtype == torch.bfloat16


def test_a_tokenizer_with_other_ids_than_the_decoders_is_refused(tmp_path, parts, ingredients):
    with pytest.raises(ConfigError, match="have other ids in the given one"):
        from_parts(parts, tmp_path / "start", tokenizer=ingredients / "tokenizer")


def test_a_tied_head_stays_tied(tmp_path, parts):
    phi3 = Phi3ForCausalLM.from_pretrained(parts / "phi3")
    tied = tmp_path / "tied"
    fake_phi3_tokenizer(tied, KNOWN)
    phi3.config.tie_word_embeddings = True
    phi3.config.save_pretrained(tied)
    save_file({n: v.detach() for n, v in phi3.named_parameters() if n != "lm_head.weight"}, tied / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(from_parts(parts, tmp_path / "start", decoder=tied))
    assert model.decoder.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.decoder.lm_head.weight[:KNOWN], phi3.model.embed_tokens.weight[:KNOWN])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": None}, "no tokenizer is given"),
        ({"decoder": "nowhere"}, "does not exist"),
        ({"tower": "phi3"}, "vision tower of the family phi3"),
    ],
)
def test_parts_that_make_no_model_are_refused(tmp_path, parts, changes, words):
    changes = {key: value and parts / value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        from_parts(parts, tmp_path / "start", **changes)
    assert not (tmp_path / "start").exists()


def test_a_decoder_without_a_weight_is_refused(tmp_path, parts):
    decoder = tmp_path / "phi3"
    shutil.copytree(parts / "phi3", decoder)
    weights = load_file(decoder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, decoder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
        from_parts(parts, tmp_path / "start", decoder=decoder)
