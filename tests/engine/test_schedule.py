"""Learning rates: known points, and properties of any schedule."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.config import Duration, OptimizerConfig
from megablip.engine.schedule import learning_rates, schedule_factor

STEP_TOKENS = 1000


def in_steps(value: int) -> Duration:
    return Duration(value=value, unit="steps")


def in_tokens(steps: int) -> Duration:
    return Duration(value=steps * STEP_TOKENS, unit="tokens")


def factor(config: OptimizerConfig, duration: Duration, step: int) -> float:
    """After `step` steps of STEP_TOKENS tokens each, a hundred of which are an epoch."""
    return schedule_factor(
        config, duration, step=step, tokens=step * STEP_TOKENS, epochs=step / 100, step_tokens=STEP_TOKENS
    )


@st.composite
def recipes(draw, units=(in_steps,)):
    """(config, duration, warmup steps, steps of the last decay, total steps)."""
    total = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, total - 1))
    schedule = draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
    decay = draw(st.integers(1, total - warmup)) if schedule == "wsd" else None
    unit = draw(st.sampled_from(units))
    config = OptimizerConfig(
        lr=1.0,
        schedule=schedule,
        warmup=unit(warmup),
        decay=decay and unit(decay),
        min_lr_ratio=draw(st.floats(0, 1)),
    )
    return config, unit(total), warmup, decay, total


@given(recipes())
def test_warmup_is_linear_and_ends_at_the_peak(recipe):
    config, duration, warmup, _, _ = recipe
    for step in range(warmup):
        assert factor(config, duration, step) == pytest.approx((step + 1) / warmup)
    assert factor(config, duration, warmup) == pytest.approx(1.0)


@given(recipes())
def test_it_rises_in_warmup_and_never_after(recipe):
    config, duration, warmup, _, total = recipe
    curve = [factor(config, duration, step) for step in range(total + 20)]
    assert curve[:warmup] == sorted(curve[:warmup])
    assert curve[warmup:] == sorted(curve[warmup:], reverse=True)
    assert min(curve) >= 0
    assert max(curve) == 1.0


@given(recipes())
def test_it_ends_at_the_least_rate_and_stays(recipe):
    config, duration, _, _, total = recipe
    end = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    for step in (total, total + 1, 100 * total):
        assert factor(config, duration, step) == pytest.approx(end, abs=1e-12)


@given(recipes())
def test_it_has_no_jump(recipe):
    """No change of one step is more than the steepest slope of warmup or decay."""
    config, duration, warmup, decay, total = recipe
    slope = max(1 / max(warmup, 1), math.pi / 2 / max(decay or total - warmup, 1))
    curve = [factor(config, duration, step) for step in range(total + 20)]
    assert max(abs(b - a) for a, b in itertools.pairwise(curve)) <= slope + 1e-12


@given(recipes())
def test_wsd_is_at_the_peak_until_its_decay(recipe):
    config, duration, warmup, decay, total = recipe
    if config.schedule == "wsd":
        assert {factor(config, duration, step) for step in range(warmup, total - decay + 1)} == {1.0}
        half = total - decay + decay // 2
        expected = 1 - (1 - config.min_lr_ratio) * (decay // 2) / decay
        assert factor(config, duration, half) == pytest.approx(expected)


@given(recipes())
def test_tokens_give_what_steps_give(recipe):
    config, duration, warmup, decay, total = recipe
    by_tokens = config.model_copy(update={"warmup": in_tokens(warmup), "decay": decay and in_tokens(decay)})
    for step in range(total + 5):
        expected = factor(config, duration, step)
        assert factor(by_tokens, in_tokens(total), step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(recipes(units=(in_steps, in_tokens)), st.integers(0, 500))
def test_the_same_counters_give_the_same_rate_bit_for_bit(recipe, step):
    config, duration, *_ = recipe
    assert factor(config, duration, step) == factor(config.model_copy(deep=True), duration.model_copy(), step)


def test_known_points():
    config = OptimizerConfig(lr=2.0, warmup="10 steps", min_lr_ratio=0.25)
    assert factor(config, in_steps(110), 4) == 0.5  # the fifth of ten warmup steps
    assert factor(config, in_steps(110), 10) == 1.0
    assert factor(config, in_steps(110), 60) == pytest.approx(0.25 + 0.75 * 0.5)
    assert factor(config, in_steps(110), 35) == pytest.approx(0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi / 4)))
    linear = config.model_copy(update={"schedule": "linear"})
    assert factor(linear, in_steps(110), 35) == pytest.approx(0.25 + 0.75 * 0.75)


def test_no_warmup_starts_at_the_peak():
    assert factor(OptimizerConfig(lr=2.0), in_steps(10), 0) == 1.0


def test_a_warmup_in_another_unit_is_the_lower_of_the_two():
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.0, warmup="10 steps")
    curve = [factor(config, in_tokens(100), step) for step in range(101)]
    assert curve[:9] == pytest.approx([(step + 1) / 10 for step in range(9)])
    assert curve[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(10, 101)])


def test_epochs_count_where_the_stage_counts_epochs():
    three = Duration(value=3, unit="epochs")
    cosine = OptimizerConfig(lr=1.0, min_lr_ratio=0.0)
    assert factor(cosine, three, 150) == pytest.approx(0.5)
    last_epoch = OptimizerConfig(lr=1.0, min_lr_ratio=0.0, schedule="wsd", decay="1 epochs")
    assert factor(last_epoch, three, 200) == 1.0
    assert factor(last_epoch, three, 250) == pytest.approx(0.5)
    assert factor(last_epoch, three, 300) == 0.0


def test_each_part_has_its_peak_and_all_one_schedule():
    config = OptimizerConfig(lr=1e-3, lr_by_part={"sampler": 1e-4, "tower": 1e-5}, warmup="4 steps")
    rates = learning_rates(config, in_steps(100), step=1, tokens=0)
    assert rates == pytest.approx({"decoder": 5e-4, "sampler": 5e-5, "tower": 5e-6})
