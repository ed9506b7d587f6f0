"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mmmoe_pretrain.config import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then a cosine to ``min_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = min(config.min_learning_rate, config.learning_rate)
    return floor + (config.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * progress))
