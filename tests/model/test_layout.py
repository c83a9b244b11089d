import json

import pytest
import torch
from transformers import AutoTokenizer

from megablip.config import ModelConfig
from megablip.errors import ConfigError
from megablip.model.blip3 import Blip3Config
from megablip.model.layout import check_tokenizer, layout_from_config, read_layout
from megablip.model.processor import Blip3Processor
from megablip.records import VisualLayout
from megablip.tokens import Tokenizer
from tests.data.small import write_tokenizer
from tests.model.tiny import features_of, make_doc, pack, tiny_config, tiny_model

CONFIG = {"vision_config": {"image_size": 16, "patch_size": 4}, "grids": [[1, 2]]}
CONFIG |= {"visual_tokens": {"per_tile": 3, "per_image": 0}}


def test_the_rule_is_the_released_one_unless_the_config_says_otherwise():
    assert layout_from_config(CONFIG) == VisualLayout(16, 4, 3, ((1, 2),), "released")
    assert layout_from_config(CONFIG | {"grid_rule": "paper"}).grid_rule == "paper"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_rule": "best"}, "grid_rule: 'best' is neither"),
        ({"grids": [[0, 0]]}, "has no tile"),
        ({"grids": [[1]]}, "TypeError"),
        ({"grids": 3}, "TypeError"),
    ],
)
def test_layouts_that_are_none(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ConfigError, match=message):
        read_layout(ModelConfig(path=str(tmp_path)))


def test_model_and_processor_keep_the_rule(tmp_path):
    config = tiny_config(grid_rule="paper", grids=())
    config.save_pretrained(tmp_path)
    expected = VisualLayout(16, 4, 3, (), "paper")
    assert (
        config.layout
        == Blip3Config.from_pretrained(tmp_path).layout
        == read_layout(ModelConfig(path=str(tmp_path)))
        == expected
    )
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    processor = Blip3Processor(tokenizer, tile_size=16, patch_size=4, tokens_per_tile=3, grids=(), grid_rule="paper")
    processor.save_pretrained(tmp_path / "saved")
    assert processor.layout == Blip3Processor.from_pretrained(tmp_path / "saved").layout == expected


@pytest.mark.parametrize("tile_layout", ["crops", "released"])
def test_a_base_tile_alone_trains(tile_layout):
    model = tiny_model(grids=(), tile_layout=tile_layout)
    packed = pack([make_doc(9, [(0, 0)], seed=3)])
    assert len(packed.tiles) == 1
    assert torch.isfinite(model(packed=packed, vision_features=features_of(model, packed)).loss)


def test_a_run_may_have_its_own_grids(tmp_path):
    tiny_config(grids=((1, 2),)).save_pretrained(tmp_path)
    for grids in (None, [(3, 1), (2, 2)], []):
        model = ModelConfig(path=str(tmp_path), grids=grids)
        expected = ((1, 2),) if grids is None else tuple(grids)
        assert read_layout(model).grids == Blip3Config.of_run(model).layout.grids == expected


def test_a_tokenizer_with_an_id_too_many(tmp_path):
    folder = write_tokenizer(tmp_path)
    tokenizer = Tokenizer(folder)
    right = {"text_config": {"vocab_size": tokenizer.vocab_size}, "image_token_id": tokenizer.image_id}

    def check(**change):
        (folder / "config.json").write_text(json.dumps(CONFIG | right | change))
        check_tokenizer(ModelConfig(path=str(folder)))

    check()
    last = tokenizer.vocab_size - 1
    with pytest.raises(ConfigError, match=f"ids up to {last}, and the decoder {last} rows"):
        check(text_config={"vocab_size": last})
    with pytest.raises(ConfigError, match=f"<image> is {tokenizer.image_id} for the tokenizer and 7 for the model"):
        check(image_token_id=7)
    with pytest.raises(ConfigError, match="no config of a megablip model"):
        check(text_config={})
