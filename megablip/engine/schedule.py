"""Learning rates: pure functions of the recipe and of megablip's own counters.

A skipped step advances the counters, and so the schedule.
"""

from __future__ import annotations

import math

from megablip.config import PARTS, Duration, OptimizerConfig, Part


def learning_rates(
    config: OptimizerConfig,
    duration: Duration,
    *,
    step: int,
    tokens: int,
    epochs: float = 0.0,
    step_tokens: int = 0,
) -> dict[Part, float]:
    """The learning rate of each part of the model for one step.

    Args:
        step, tokens, epochs: done before this step.
        step_tokens: tokens of this step.
    """
    factor = schedule_factor(config, duration, step=step, tokens=tokens, epochs=epochs, step_tokens=step_tokens)
    return {part: factor * config.lr_by_part.get(part, config.lr) for part in PARTS}


def schedule_factor(
    config: OptimizerConfig,
    duration: Duration,
    *,
    step: int,
    tokens: int,
    epochs: float = 0.0,
    step_tokens: int = 0,
) -> float:
    """Share of the peak, at most 1: the lower of warmup and decay.

    The decay begins where the warmup ends, if both are counted in one unit;
    in different units that place is not known beforehand, and it begins with
    the run.  The warmup counts this step as done, for at 0 it would be wasted.
    Arguments as those of `learning_rates`.

    Sources: cosine, Loshchilov & Hutter, "SGDR" (arXiv 1608.03983), without
    restarts; warmup-stable-decay, Hu et al., "MiniCPM" (arXiv 2404.06395), with
    a linear decay.
    """
    warmup, first = config.warmup, 0
    rise = 1.0
    if warmup.value:
        rise = min(1.0, warmup.done(steps=step + 1, tokens=tokens + max(step_tokens, 1)))
        first = warmup.value if warmup.unit == duration.unit else 0
    if config.decay:
        first = duration.value - config.decay.value
    done = duration.count(steps=step, tokens=tokens, epochs=epochs)
    progress = min(1.0, max(0.0, done - first) / max(duration.value - first, 1))
    return min(rise, 1.0 - (1.0 - config.min_lr_ratio) * _fall(config.schedule, progress))


def _fall(schedule: str, progress: float) -> float:
    """From 0 at progress 0 to 1 at progress 1, but for a constant schedule."""
    if schedule == "constant":
        return 0.0
    if schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return progress
