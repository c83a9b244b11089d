"""Parameter groups."""

from __future__ import annotations

import pytest

from megablip.config import OptimizerConfig
from megablip.engine.optimizer import decays, parameter_groups, part_of

CONFIG = OptimizerConfig(lr=2.0, weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.self_attn.qkv_proj.weight", (8, 4), True),
        ("lm_head.weight", (8, 4), True),
        ("conv.weight", (8, 3, 2, 2), True),
        ("layers.0.input_layernorm.weight", (8,), False),
        ("lm_head.bias", (8,), False),
        ("model.embed_tokens.weight", (8, 4), False),
        ("sampler.latents", (3, 4), False),
        ("vision_tower.embeddings.patch_embedding.weight", (8, 3, 2, 2), True),
        ("vision_tower.embeddings.patch_embedding.bias", (8,), False),
        ("vision_tower.embeddings.position_embedding.weight", (9, 8), False),
    ],
)
def test_which_weights_decay(name, shape, expected):
    assert decays(name, shape) is expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "tower"),
        ("sampler.latents", "sampler"),
        ("decoder.lm_head.weight", "decoder"),
        ("first.weight", "decoder"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_groups_hold_each_parameter_once():
    named = [
        ("a.weight", 1, (2, 2)),
        ("a.bias", 2, (2,)),
        ("sampler.b.weight", 3, (2, 2)),
        ("sampler.latents", 4, (2, 2)),
        ("vision_tower.c.weight", 5, (2, 2)),
        ("vision_tower.c.bias", 6, (2,)),
        ("d.weight", 7, (2, 2)),
    ]
    assert parameter_groups(named, CONFIG) == [
        {"params": [1, 7], "part": "decoder", "weight_decay": 0.1},
        {"params": [2], "part": "decoder", "weight_decay": 0.0},
        {"params": [3], "part": "sampler", "weight_decay": 0.1},
        {"params": [4], "part": "sampler", "weight_decay": 0.0},
        {"params": [5], "part": "tower", "weight_decay": 0.1},
        {"params": [6], "part": "tower", "weight_decay": 0.0},
    ]


def test_an_empty_group_is_left_out():
    assert parameter_groups([("a.bias", 2, (2,))], CONFIG) == [{"params": [2], "part": "decoder", "weight_decay": 0.0}]
