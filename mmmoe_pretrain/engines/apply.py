"""From a config to a running engine: the only place with the order of application.

Groups exist (``parallel/mesh.py``) -> the trunk is cut into pipeline stages -> this rank's stages are
built, matrices cut by the tensor group and experts by the expert group -> activation recomputation and
precision -> compilation -> what is frozen -> the engine wraps them (data parallelism, optimizer). ``mmmoe plan``
builds by the same functions, on the device ``meta`` (``plan/build.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.engines import ENGINES
from mmmoe_pretrain.engines.base import HALF_TYPES, Engine
from mmmoe_pretrain.engines.deepspeed_modules import compute_in_half
from mmmoe_pretrain.engines.hold import freeze
from mmmoe_pretrain.models.compiling import compile_blocks
from mmmoe_pretrain.models.costs import block_costs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.models.trunk import set_recompute
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import Stage, cut_stages, stages_of_rank


def build_engine(config: RunConfig, groups: Groups, device: torch.device) -> Engine:
    """The engine that ``parallel.engine`` names, around freshly initialised models."""
    stages = cut_trunk(config, groups.num_stages)
    own = stages_of_rank(stages, groups.pipeline_rank, groups.pipeline_size, groups.virtual_size)
    models = build_models(config, groups, own)
    if config.train.compile == "blocks":
        for model in models:
            compile_blocks(model, device)
    if config.optimizer.hold is not None:
        freeze(models, config.optimizer.hold.frozen, groups, device)
    module, _, name = ENGINES[config.parallel.engine].place.partition(":")
    make = getattr(importlib.import_module(module), name)  # here: an engine library takes seconds to import
    return make(models, config, device)


def cut_trunk(config: RunConfig, num_stages: int) -> tuple[Stage, ...]:
    """The pipeline stages of the whole model, cut by cost."""
    costs, first, last = block_costs(config)
    return cut_stages(costs, num_stages, first, last)


def build_models(config: RunConfig, groups: Groups, stages: Sequence[Stage]) -> list[PretrainingModel]:
    """One model a stage, on torch's default device; its parameters have the types that the engine's have."""
    models = [PretrainingModel(config, groups, stage) for stage in stages]
    for model in models:
        set_recompute(model, config.train.recompute, hooks_after_modules=config.parallel.zero_stage == 3)
        dtype = HALF_TYPES.get(config.train.precision)
        if dtype is None:
            continue
        if ENGINES[config.parallel.engine].half_parameters:
            model.use_half(dtype)
        else:
            compute_in_half(model, dtype, cast_again=config.train.recompute != "blocks")
    return models
