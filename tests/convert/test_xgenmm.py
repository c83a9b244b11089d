"""Released weights to ours and back; the reference fixture stands for them at a small size."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Phi3Config, SiglipVisionConfig, SiglipVisionModel

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.xgenmm import ADDED_TOKENS
from megablip.convert.xgenmm import hf_to_xgenmm, xgenmm_to_hf
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from tests.model import test_reference as reference
from tests.model.test_reference import CASES, FACTS, FIXTURE
from tests.model.tiny import tiny_model

FIRST = FACTS["image_token_id"]
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def config(rows=FIRST + ADDED_TOKENS):
    ids = {"pad_token_id": FACTS["pad_token_id"], "bos_token_id": 1, "eos_token_id": 2}
    return Blip3Config(
        text_config=Phi3Config(**FACTS["text"] | ids | {"vocab_size": rows}),
        vision_config=SiglipVisionConfig(**FACTS["vision"]),
        sampler=FACTS["resampler"],
        grids=[(w // FACTS["base_tile"], h // FACTS["base_tile"]) for w, h in FACTS["grids_wh"]],
        tile_layout="released",
        image_token_id=FIRST,
        pad_token_id=FACTS["pad_token_id"],
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    config().save_pretrained(folder := tmp_path_factory.mktemp("config"))
    return folder


@pytest.fixture(scope="module")
def released():
    return {name.removeprefix("vlm."): value for name, value in load_file(FIXTURE / "model.safetensors").items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, config_file):
    output = tmp_path_factory.mktemp("converted") / "out"
    lost = xgenmm_to_hf(FIXTURE / "model.safetensors", output, config=config_file)
    rows = load_file(FIXTURE / "model.safetensors")["vlm.lang_model.lm_head.bias"].shape[0]
    assert lost == [
        f"lang_model.{name}, rows {FIRST} to {rows - 1}" for name in sorted(TABLES, key="lang_model.{}".format)
    ]
    return output


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForImageTextToText.from_pretrained(converted).eval()


@pytest.fixture(scope="module")
def cases():
    return load_file(FIXTURE / "cases.safetensors")


@pytest.mark.parametrize("mode", ["base", "anyres_patch"])
@pytest.mark.parametrize("number", CASES)
def test_the_converted_reference_gives_its_logits(model, cases, number, mode):
    reference.check_logits_and_loss(model, cases, number, mode)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lavis", [False, True])
def test_there_and_back_is_bit_for_bit_but_for_dead_rows(tmp_path, config_file, released, dtype, lavis):
    xgenmm_to_hf(FIXTURE / "model.safetensors", tmp_path / "hf", config=config_file, dtype=dtype)
    notes = hf_to_xgenmm(tmp_path / "hf", tmp_path / "back", dtype=dtype, lavis=lavis)
    if lavis:
        assert [path.name for path in (tmp_path / "back").iterdir()] == ["model.pt"]
        back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)["model_state_dict"]
        xgenmm_to_hf(tmp_path / "back", tmp_path / "again", config=config_file, dtype=dtype)
        assert ExportReader(tmp_path / "again").hash() == ExportReader(tmp_path / "hf").hash()
    else:
        back = load_file(tmp_path / "back" / "model.safetensors")
    prefix = "" if lavis else "vlm."
    assert set(back) == {prefix + name for name in released}
    for name, value in released.items():
        found = back[prefix + name]
        assert found.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        if name.removeprefix("lang_model.") in TABLES:
            assert not found[FIRST:].any()
            found, value = found[:FIRST], value[:FIRST]
        assert torch.equal(found.float(), value.float()), name
    assert len(notes) == len(TABLES)
    assert all(note.endswith("zeros") for note in notes)


def test_ours_there_and_back_is_bit_for_bit(tmp_path):
    """With rows past the added tokens, which the large tables have too."""
    start = config(rows=FIRST + ADDED_TOKENS + 3)
    torch.manual_seed(0)
    Blip3ForConditionalGeneration(start).save_pretrained(tmp_path / "a")
    hf_to_xgenmm(tmp_path / "a", tmp_path / "b")
    xgenmm_to_hf(tmp_path / "b", tmp_path / "c", config=tmp_path / "a")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert json.loads((tmp_path / "c" / "config.json").read_text())["tile_layout"] == "released"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_training_needs_a_tower(tmp_path, config_file, released, converted, wrapped):
    trained = {
        "module." + name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): value.clone()
        for name, value in released.items()
        if not name.startswith("vision_encoder.")
    }
    content = {"epoch": 1, "model_state_dict": trained, "optimizer_state_dict": {}} if wrapped else trained
    torch.save(content, tmp_path / "checkpoint_1.pt")
    with pytest.raises(CheckpointError, match="no weights of the vision tower") as caught:
        xgenmm_to_hf(tmp_path / "checkpoint_1.pt", tmp_path / "out", config=config_file)
    assert "--tower" in caught.value.remedy
    tower = SiglipVisionModel(SiglipVisionConfig(**FACTS["vision"])).float()
    save_file(  # as older transformers and whole SigLIP models name them
        {
            name.replace("vision_encoder.", "vision_model."): value.float()
            for name, value in released.items()
            if name.startswith("vision_encoder.")
        }
        | {"text_model.embeddings.weight": torch.zeros(2)},
        (tmp_path / "model.safetensors"),
    )
    assert len(list(tower.parameters())) == sum(name.startswith("vision_encoder.") for name in released)
    xgenmm_to_hf(tmp_path / "checkpoint_1.pt", tmp_path / "out", config=config_file, tower=tmp_path)
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted))
    assert set(written) == set(expected)
    for name, value in expected.items():
        assert torch.equal(written[name], value), name


def change(released, **changes):
    weights = {f"vlm.{name}": value.clone() for name, value in released.items()}
    for name, value in changes.items():
        weights.pop(f"vlm.{name}", None)
        if value is not None:
            weights[name] = value
    return weights


LATENTS, NORM = "vision_tokenizer.latents", "vision_tokenizer.norm.bias"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({LATENTS: None}, r"vision_tokenizer\.latents, which is missing"),
        ({"vlm.extra": torch.zeros(2)}, "extra, which is unknown"),
        (
            {"vlm.vision_tokenizer.latents": torch.zeros(3, 48)},
            r"vision_tokenizer\.latents is \(3, 48\), not \(8, 48\)",
        ),
        (
            {"vision_tokenizer.norm.bias": torch.zeros(48), "vlm.vision_tokenizer.norm.bias": torch.zeros(48)},
            "one tensor's",
        ),
    ],
)
def test_what_is_not_the_layout_is_refused(tmp_path, config_file, released, changes, words):
    save_file(change(released, **changes), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=words):
        xgenmm_to_hf(tmp_path / "weights.safetensors", tmp_path / "out", config=config_file)
    assert not (tmp_path / "out").exists()


def test_another_size_than_the_releases_asks_for_a_config(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        xgenmm_to_hf(FIXTURE / "model.safetensors", tmp_path / "out")
    assert "--config" in caught.value.remedy


def test_other_parts_have_no_released_names(tmp_path):
    model = tiny_model()
    model.config.text_config.model_type = "llama"
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="not llama and siglip_vision_model"):
        hf_to_xgenmm(tmp_path / "a", tmp_path / "b")


def test_a_tied_head_has_no_released_name(tmp_path):
    start = config()
    start.text_config.tie_word_embeddings = True
    Blip3ForConditionalGeneration(start).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="tied to the embeddings"):
        hf_to_xgenmm(tmp_path / "a", tmp_path / "b")


def test_a_model_whose_tiles_the_released_code_would_regroup_is_told(tmp_path):
    start = config()
    start.tile_layout = "crops"
    Blip3ForConditionalGeneration(start).save_pretrained(tmp_path / "a")
    assert "tile_layout is crops" in hf_to_xgenmm(tmp_path / "a", tmp_path / "b")[-1]


def test_the_tokenizer_gets_the_added_tokens(tmp_path, config_file):
    from tokenization.train import train_tokenizer

    (tmp_path / "corpus.txt").write_text("one two three\nfour five six\n" * 20)
    train_tokenizer([tmp_path / "corpus.txt"], tmp_path / "other", 290)
    with pytest.raises(ConfigError, match=f"the weights give it {FIRST}"):
        xgenmm_to_hf(FIXTURE / "model.safetensors", tmp_path / "out", config=config_file, tokenizer=tmp_path / "other")
    phi3 = fake_phi3_tokenizer(tmp_path / "phi3", FIRST - 1)
    xgenmm_to_hf(FIXTURE / "model.safetensors", tmp_path / "out", config=config_file, tokenizer=phi3)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    added = ["<pad>", "<image>", "<image placeholder>", "<|endofchunk|>"]
    assert processor.tokenizer.convert_tokens_to_ids(added) == list(range(FIRST - 1, FIRST + 3))
    assert processor.layout == AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.layout


def fake_phi3_tokenizer(folder, size):
    """A tokenizer without the added tokens, of `size` ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()  # so that text can't spell the control tokens
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
