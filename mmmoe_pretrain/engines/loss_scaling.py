"""How an engine counts on from step to step, and fp16's dynamic loss scale with it (arXiv 1710.03740).

megatron-core has the same rule in its ``DynamicGradScaler``, of which each of its optimizers has one: dense
parameters and experts would be unscaled by different numbers once one of them alone overflows. So both engines
scale their losses by this one.
"""

from __future__ import annotations

import dataclasses

import torch

from mmmoe_pretrain.config import LossScaleConfig, TrainConfig
from mmmoe_pretrain.engines.base import LossScale, Progress

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the trunk, by train.precision


def first_progress(train: TrainConfig) -> Progress:
    """Of a new run; without a loss scale where nothing is scaled."""
    settings = train.loss_scale
    scaled = train.precision == "fp16"
    return Progress(0, 0, LossScale(settings.initial, 0, settings.hysteresis) if scaled else None)


def resumed(progress: Progress, train: TrainConfig) -> Progress:
    """Of a run that goes on after ``progress``, whose precision may have been another one."""
    own = first_progress(train).loss_scale
    if own is None or progress.loss_scale is None:
        return dataclasses.replace(progress, loss_scale=own)
    return progress


def gradient_factor(norm: float, limit: float, scale: float) -> float:
    """Unscales gradients and clips them to ``limit`` (0: does not), ``norm`` being the unscaled one."""
    return (min(1.0, limit / (norm + CLIP_EPS)) if limit else 1.0) / scale


def after_step(progress: Progress, skipped: bool, settings: LossScaleConfig) -> Progress:
    """``skipped``: the step was left out, as after an overflow."""
    scale = progress.loss_scale
    return Progress(
        progress.steps + 1,
        progress.updates + (not skipped),
        None if scale is None else next_scale(scale, skipped, settings),
    )


def next_scale(scale: LossScale, overflow: bool, settings: LossScaleConfig) -> LossScale:
    """The scale halves at the overflow that uses up the hysteresis and at each one from then on; ``window`` good
    steps in a row double it and give the hysteresis back."""
    if overflow and scale.hysteresis > 1:
        return LossScale(scale.scale, 0, scale.hysteresis - 1)
    if overflow:
        return LossScale(max(scale.scale / 2, settings.minimum), 0, 1)
    if scale.good_steps + 1 < settings.window:
        return LossScale(scale.scale, scale.good_steps + 1, scale.hysteresis)
    return LossScale(scale.scale * 2, 0, settings.hysteresis)
