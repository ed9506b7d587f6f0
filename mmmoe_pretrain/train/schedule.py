"""The learning rate as a pure function of the step.

All schedules begin with a linear warm-up. ``wsd`` (warmup-stable-decay, arXiv 2404.06395) holds the rate and decays
linearly at the end, so that a run can be made longer until its decay has begun.
"""

from __future__ import annotations

import math
from typing import Any

from mmmoe_pretrain.config import OptimizerConfig, RunConfig
from mmmoe_pretrain.train.start import differences

JUMP = 0.01  # of the rate; smaller changes are not reported


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of step ``step`` (from 0)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    end, begin = config.decay_steps or total_steps, config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, end - (config.wsd_decay_steps or math.ceil(end / 10)))
    progress = min(1.0, max(0, step - begin) / max(1, end - begin))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    floor = min(config.min_learning_rate, config.learning_rate)
    return floor + (config.learning_rate - floor) * left


def jump_on_resume(step: int, config: RunConfig, saved: dict[str, Any]) -> str:
    """A warning where a run that has done ``step`` steps resumes at another rate than its schedule so far gives;
    empty where it does not, or has no step left. ``saved``: the config of its checkpoint."""
    before, steps = OptimizerConfig.model_validate(saved["optimizer"]), saved["train"]["steps"]
    now = learning_rate(step, config.train.steps, config.optimizer)
    planned = learning_rate(step, steps, before)
    if step == 0 or step >= config.train.steps or abs(now - planned) <= JUMP * planned:
        return ""
    new = {"train": {"steps": config.train.steps}, "optimizer": dict(config.optimizer)}
    story = ", ".join(differences({"train": {"steps": steps}, "optimizer": dict(before)}, new))
    last = learning_rate(step - 1, steps, before)
    longer = (
        f"; optimizer.decay_steps={steps} keeps that schedule, and optimizer.schedule constant or wsd suits runs "
        f"whose length is not known"
    )
    return (
        f"the learning rate of step {step + 1} is {now:.2g}; that of step {step} was {last:.2g}, and the schedule so "
        f"far gives {planned:.2g}: {story}{longer if before == config.optimizer else ''}"
    )
