"""What a stage can't start from is called by its name, with the command that makes an export of it."""

import json

import pytest

from megablip.checkpoint.start import MODEL_TYPE, check_start
from megablip.errors import ConfigError
from megablip.model.blip3 import Blip3Config
from tests.minimal import make_start


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_an_export_is_right(tmp_path):
    assert Blip3Config.model_type == MODEL_TYPE
    check_start(str(make_start(tmp_path / "whole")))
    sharded = make_start(tmp_path / "sharded")
    (sharded / "model.safetensors").rename(sharded / "model.safetensors.index.json")
    check_start(str(sharded))


# What lies in the folder, and the words that name it and say what to do.
WRONG = {
    "nothing": ({}, ["no model to start from", "convert init"]),
    "run": ({"config.yaml": "", "status.json": "{}"}, ["the directory of a run", "zero-to-hf {folder} FOLDER"]),
    "run without status": ({"checkpoints/step_00000001/COMMITTED": ""}, ["the directory of a run", "zero-to-hf"]),
    "checkpoints": (
        {"step_00000001/COMMITTED": "", "latest": "step_00000001"},
        ["the checkpoints of a run", "zero-to-hf {folder.parent} FOLDER"],
    ),
    "checkpoint": ({"COMMITTED": "", "manifest.json": "{}"}, ["a checkpoint of a run", "zero-to-hf {folder} FOLDER"]),
    "adapter": (
        {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
        ["an adapter without its base", "merge-lora {folder} BASE FOLDER"],
    ),
    "adapter beside a model": (
        {"config.json": {"model_type": "megablip"}, "model.safetensors": "", "adapter_config.json": "{}"},
        ["an adapter beside the model", "merge-lora"],
    ),
    "DeepSpeed": ({"latest": "global_step1"}, ["that DeepSpeed saved", "--like MODEL {folder} FOLDER"]),
    "DeepSpeed universal": ({"latest_universal": "step1"}, ["that DeepSpeed saved"]),
    "DeepSpeed tag": ({"mp_rank_00_model_states.pt": ""}, ["that DeepSpeed saved"]),
    "bare decoder": (
        {"config.json": {"model_type": "phi3"}, "model.safetensors": ""},
        ["a model of type 'phi3'", "convert init"],
    ),
    "xGen-MM": ({"config.json": {"model_type": "xgenmm"}}, ["released xGen-MM weights", "xgenmm-to-hf"]),
    "no weights": ({"config.json": {"model_type": "megablip"}}, ["no weights", "copy or convert it again"]),
    "broken config": ({"config.json": "{"}, ["config can't be read", "copy or convert"]),
    "no object": ({"config.json": "[1]"}, ["config can't be read"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_export_is_named(tmp_path, kind):
    files, words = WRONG[kind]
    folder = tmp_path / "models" / "start"
    folder.mkdir(parents=True)
    for name, content in files.items():
        write(folder / name, content)
    with pytest.raises(ConfigError) as caught:
        check_start(str(folder))
    for word in (*words, str(folder)):
        assert word.format(folder=folder) in str(caught.value)


def test_a_file_is_no_folder(tmp_path):
    write(tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="it is a file"):
        check_start(str(tmp_path / "weights.pt"))
