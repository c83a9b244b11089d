"""Weights of one kind of sampler don't become another's."""

import json
import shutil

import pytest
from transformers import AutoModelForImageTextToText

from megablip.checkpoint.export import ExportReader, check_sampler
from megablip.errors import CheckpointError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration

from .variants import KINDS, SETTINGS, variant_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        variant_model(kind).save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_each_loads_its_own(folders, kind):
    model = AutoModelForImageTextToText.from_pretrained(folders[kind])
    expected = variant_model(kind).state_dict()
    assert all((value == expected[name]).all() for name, value in model.state_dict().items())
    check_sampler(ExportReader(folders[kind]), model.config)


@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_another_config_is_refused(folders, stored, wanted):
    if stored == wanted:
        return
    config = Blip3Config.from_pretrained(folders[wanted])
    message = f"sampler is of kind '{wanted}', and the weights are '{stored}'"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForImageTextToText.from_pretrained(folders[stored], config=config)
    with pytest.raises(CheckpointError, match=message):
        Blip3ForConditionalGeneration.from_pretrained(folders[stored], sampler=config.sampler)


@pytest.mark.parametrize(
    ("stored", "wanted", "theirs"),
    [
        ("perceiver", "qformer", "'perceiver' or 'fixed'"),
        ("fixed", "instruct", "'perceiver' or 'fixed'"),
        ("instruct", "mlp", "'instruct'"),
        ("mlp", "perceiver", "'mlp'"),
        ("qformer", "fixed", "'qformer'"),
    ],
)
def test_a_changed_config_file_is_refused(folders, tmp_path, stored, wanted, theirs):
    """By from_pretrained, and at the start of a run."""
    folder = tmp_path / "changed"
    shutil.copytree(folders[stored], folder)
    shutil.copy(folders[wanted] / "config.json", folder)
    message = f"sampler is of kind '{wanted}', and the weights are {theirs}"
    with pytest.raises(CheckpointError, match=message):
        Blip3ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        check_sampler(ExportReader(folder), Blip3Config.from_pretrained(folder))


def test_more_layers_are_no_other_kind(folders, tmp_path):
    config = json.loads((folders["perceiver"] / "config.json").read_text())
    config["sampler"] |= {"depth": SETTINGS["perceiver"]["depth"] + 1}
    with pytest.raises(CheckpointError, match="the weights are of this kind in other sizes"):
        check_sampler(ExportReader(folders["perceiver"]), Blip3Config.from_dict(config))


def test_other_sizes_are_refused(folders):
    config = Blip3Config.from_pretrained(folders["perceiver"])
    config.sampler["ff_mult"] += 1
    with pytest.raises(CheckpointError, match="of this kind in other sizes: they differ in 4 weights, for example lay"):
        Blip3ForConditionalGeneration.from_pretrained(folders["perceiver"], config=config)
    config = Blip3Config.from_pretrained(folders["perceiver"])
    config.text_config.intermediate_size += 1
    with pytest.raises(CheckpointError, match=r"mlp.* is \(.*in the folder and"):
        Blip3ForConditionalGeneration.from_pretrained(folders["perceiver"], config=config)
