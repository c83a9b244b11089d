"""The released key map: at full size by shapes alone, and on the reference fixture by values."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from megablip.checkpoint.xgenmm import (
    PREFIX,
    bare_name,
    model_shapes,
    our_sources,
    our_unfilled,
    released_config,
    released_layout,
    released_name,
)
from megablip.errors import CheckpointError
from megablip.model.blip3 import Blip3Config

FIXTURE = Path(__file__).parents[1] / "fixtures" / "xgen_mm_reference"
FIRST_ADDED = 32012


@pytest.fixture(scope="module")
def full():
    """Shapes of the released model's size, on no memory."""
    return model_shapes(released_config())


@pytest.fixture(scope="module")
def released(full):
    return {tensor.name: tensor for tensor in released_layout(full, first_added=FIRST_ADDED)}


def count(shapes, prefix):
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def test_counts_at_full_size(full, released):
    assert count(full, "vision_tower.") == 428_225_600  # with the pooling head
    assert count(full, "vision_tower.head.") == 15_238_352
    assert count(full, "sampler.") == 109_901_568
    shapes = {name: tensor.shape for name, tensor in released.items()}
    assert count(shapes, "vision_encoder.") == 428_225_600
    assert count(shapes, "vision_tokenizer.") == 109_901_568
    assert count(shapes, "lang_model.") == 3_821_130_051
    parts = {part: sum(name.startswith(part) for name in shapes) for part in ("vision_e", "vision_t", "lang_")}
    assert parts == {"vision_e": 448, "vision_t": 71, "lang_": 199}
    assert len(shapes) == 718


def test_shapes_at_full_size(released):
    """Those of the release v1.5."""
    layer, tower, sampler = "lang_model.model.layers.31", "vision_encoder.encoder.layers.26", "vision_tokenizer"
    expected = {
        "lang_model.model.embed_tokens.weight": (32064, 3072),
        "lang_model.model.embed_tokens.additional_embedding.weight": (3, 3072),
        f"{layer}.self_attn.qkv_proj.weight": (9216, 3072),
        f"{layer}.self_attn.o_proj.weight": (3072, 3072),
        f"{layer}.mlp.gate_up_proj.weight": (16384, 3072),
        f"{layer}.mlp.down_proj.weight": (3072, 8192),
        f"{layer}.input_layernorm.weight": (3072,),
        f"{layer}.post_attention_layernorm.weight": (3072,),
        "lang_model.model.norm.weight": (3072,),
        "lang_model.lm_head.weight": (32064, 3072),
        "lang_model.lm_head.bias": (32064,),
        "lang_model.lm_head.additional_fc.weight": (3, 3072),
        "lang_model.lm_head.additional_fc.bias": (3,),
        "vision_encoder.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_encoder.embeddings.patch_embedding.bias": (1152,),
        "vision_encoder.embeddings.position_embedding.weight": (729, 1152),
        f"{tower}.layer_norm1.weight": (1152,),
        f"{tower}.self_attn.out_proj.weight": (1152, 1152),
        f"{tower}.mlp.fc1.weight": (4304, 1152),
        f"{tower}.mlp.fc2.bias": (1152,),
        "vision_encoder.post_layernorm.weight": (1152,),
        "vision_encoder.head.probe": (1, 1, 1152),
        "vision_encoder.head.attention.in_proj_weight": (3456, 1152),
        "vision_encoder.head.mlp.fc1.weight": (4304, 1152),
        f"{sampler}.latents": (128, 1152),
        f"{sampler}.layers.5.0.norm_media.weight": (1152,),
        f"{sampler}.layers.5.0.to_q.weight": (1536, 1152),
        f"{sampler}.layers.5.0.to_kv.weight": (3072, 1152),
        f"{sampler}.layers.5.0.to_out.weight": (1152, 1536),
        f"{sampler}.layers.5.1.0.bias": (1152,),
        f"{sampler}.layers.5.1.1.weight": (4608, 1152),
        f"{sampler}.layers.5.1.3.weight": (1152, 4608),
        f"{sampler}.norm.bias": (1152,),
        f"{sampler}.projection.weight": (3072, 1152),
        f"{sampler}.projection.bias": (3072,),
    }
    assert {name: released[name].shape for name in expected} == expected


def test_names_and_shapes_of_the_fixture():
    """A file that the public code wrote has exactly these."""
    facts = json.loads((FIXTURE / "reference.json").read_text())
    with safe_open(FIXTURE / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        stored = {bare_name(name): tuple(file.get_slice(name).get_shape()) for name in names}
    assert all(name.startswith(PREFIX) for name in names)
    config = Blip3Config(
        text_config=facts["text"] | {"pad_token_id": facts["pad_token_id"], "eos_token_id": 2},
        vision_config=facts["vision"],
        sampler=facts["resampler"],
        image_token_id=facts["image_token_id"],
    )
    layout = released_layout(model_shapes(config), first_added=facts["initial_tokenizer_len"])
    assert {tensor.name: tensor.shape for tensor in layout} == stored


@pytest.mark.parametrize(
    ("rows", "table_rows", "large", "lost", "unfilled"),
    [
        (32015, None, [(0, 32012, 0)], [(32012, 32064)], []),
        (32064, None, [(0, 32012, 0), (32015, 32064, 32015)], [(32012, 32015)], []),
        (32064, 32064, [(0, 32012, 0), (32015, 32064, 32015)], [(32012, 32015)], []),
        (32100, 32064, [(0, 32012, 0), (32015, 32064, 32015)], [(32012, 32015)], [(32064, 32100)]),
        (32020, 32064, [(0, 32012, 0), (32015, 32020, 32015)], [(32012, 32015), (32020, 32064)], []),
    ],
)
def test_decoupled_rows(rows, table_rows, large, lost, unfilled):
    ours = {
        "decoder.model.embed_tokens.weight": (rows, 8),
        "decoder.lm_head.weight": (rows, 8),
        "decoder.lm_head.bias": (rows,),
    }
    layout = released_layout(ours, first_added=FIRST_ADDED, table_rows=table_rows)
    found = {tensor.name.removeprefix("lang_model."): tensor for tensor in layout}
    tables = {
        "model.embed_tokens.weight": ("model.embed_tokens.additional_embedding.weight", (8,)),
        "lm_head.weight": ("lm_head.additional_fc.weight", (8,)),
        "lm_head.bias": ("lm_head.additional_fc.bias", ()),
    }
    assert set(found) == set(tables) | {small for small, _ in tables.values()}
    for table, (small, row) in tables.items():
        assert found[table].shape == (32064, *row)
        assert [(part.start, part.end, part.ours_start) for part in found[table].rows] == large
        assert found[table].unplaced == lost
        assert found[small].shape == (3, *row)
        assert [(part.start, part.end, part.ours_start) for part in found[small].rows] == [(0, 3, 32012)]
        assert found[small].unplaced == []
        assert {part.ours for part in (*found[table].rows, *found[small].rows)} == {f"decoder.{table}"}
    assert our_unfilled(layout, ours) == {name: unfilled for name in ours if unfilled}
    for parts in our_sources(layout).values():
        assert [part.ours_start for _, part in parts] == sorted(part.ours_start for _, part in parts)


def test_every_row_of_ours_is_filled_once(full):
    layout = released_layout(full, first_added=FIRST_ADDED)
    assert our_unfilled(layout, full) == {}
    for name, parts in our_sources(layout).items():
        assert sum(part.end - part.start for _, part in parts) == full[name][0]
        assert all(tensor.shape[1:] == full[name][1:] for tensor, _ in parts)
    assert sorted(tensor.name for tensor in layout if tensor.unplaced) == [
        "lang_model.lm_head.bias",
        "lang_model.lm_head.weight",
        "lang_model.model.embed_tokens.weight",
    ]


def test_what_ours_lacks_is_there_without_rows(full, released):
    ours = {
        name: shape
        for name, shape in full.items()
        if not name.startswith("vision_tower.head.") and name != "decoder.lm_head.bias"
    }
    layout = {tensor.name: tensor for tensor in released_layout(ours, first_added=FIRST_ADDED)}
    assert {name: tensor.shape for name, tensor in layout.items()} == {
        name: tensor.shape for name, tensor in released.items()
    }
    empty = {name for name, tensor in layout.items() if not tensor.rows}
    assert empty == {name for name in released if name.startswith("vision_encoder.head.") or "bias" in name} & empty
    assert len(empty) == 13  # 11 of the pooling head, 2 of the bias
    assert all(layout[name].unplaced == [(0, layout[name].shape[0])] for name in empty)


def test_names():
    assert bare_name("vlm.lang_model.lm_head.bias") == bare_name("module.lang_model.lm_head.bias")
    wrapped = "module.lang_model.model.layers.3._checkpoint_wrapped_module.mlp.down_proj.weight"
    assert bare_name(wrapped) == released_name("decoder.model.layers.3.mlp.down_proj.weight")
    for other in (
        "lora.down",
        "sampler.layers.0.0.to_q.lora_A.weight",
        "sampler.0.weight",
        "vision_tower.embeddings.class_embedding",  # CLIP's
        "decoder.transformer.wte.weight",
        "decoder.model.layers.0.mlp.down_proj.lora_B.weight",
    ):
        with pytest.raises(CheckpointError, match=f"{other} has no place in the released layout"):
            released_layout({other: (3, 4)}, first_added=2)
    with pytest.raises(CheckpointError, match="has 10 rows, too few for 3 added tokens from id 8 on"):
        released_layout({"decoder.lm_head.weight": (10, 4)}, first_added=8)
