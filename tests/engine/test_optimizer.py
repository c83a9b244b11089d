"""Parameter groups and the learning rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.config import Duration, OptimizerConfig
from megablip.engine.optimizer import decays, learning_rate, parameter_groups

CONFIG = OptimizerConfig(lr=2.0, weight_decay=0.1, warmup="10 steps", min_lr_ratio=0.25)
STEPS = Duration.model_validate("100 steps")


def rate(step, *, tokens=0, config=CONFIG, duration=STEPS):
    return learning_rate(config, duration, step=step, tokens=tokens)


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
    ],
)
def test_which_weights_decay(name, shape, expected):
    assert decays(name, shape) is expected


def test_groups_hold_each_parameter_once():
    named = [("a.weight", 1, (2, 2)), ("a.bias", 2, (2,)), ("b.weight", 3, (2, 2)), ("latents", 4, (2, 2))]
    assert parameter_groups(named, CONFIG) == [
        {"params": [1, 3], "weight_decay": 0.1},
        {"params": [2, 4], "weight_decay": 0.0},
    ]


def test_an_empty_group_is_left_out():
    assert parameter_groups([("a.bias", 2, (2,))], CONFIG) == [{"params": [2], "weight_decay": 0.0}]


def test_the_schedule_at_known_points():
    cosine = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 0.04))
    assert rate(4) == pytest.approx(2.0 * 0.5 * cosine)  # the fifth of ten warmup steps
    assert rate(50) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert rate(100) == pytest.approx(2.0 * 0.25)
    assert rate(1000) == pytest.approx(2.0 * 0.25)


def test_no_warmup_starts_at_the_peak():
    assert rate(0, config=OptimizerConfig(lr=2.0)) == 2.0


def test_tokens_count_where_the_recipe_counts_tokens():
    duration = Duration.model_validate("1k tokens")
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.0, warmup="100 tokens")
    assert rate(3, tokens=49, config=config, duration=duration) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(math.pi * 0.049))
    )
    assert rate(3, tokens=1000, config=config, duration=duration) == pytest.approx(0)


@given(st.integers(0, 200))
def test_the_rate_is_positive_rises_in_warmup_and_falls_after(step):
    assert 0 < rate(step) <= 2.0
    if step < 9:
        assert rate(step + 1) > rate(step)
    else:
        assert rate(step + 1) <= rate(step)
