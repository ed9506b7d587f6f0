"""From a config to a running engine: the only place with the order of application.

Groups exist (``parallel/mesh.py``) -> the trunk is cut into pipeline stages -> this rank's stages are
built, matrices cut by the tensor group and experts by the expert group -> activation recomputation and
compilation -> precision -> the engine wraps them (data parallelism, optimizer).
"""

from __future__ import annotations

import importlib

import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.engines import ENGINES
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.models.compiling import compile_blocks
from mmmoe_pretrain.models.costs import block_costs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.models.trunk import set_recompute
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import cut_stages, stages_of_rank


def build_engine(config: RunConfig, groups: Groups, device: torch.device) -> Engine:
    """The engine that ``parallel.engine`` names, around freshly initialised models."""
    costs, first, last = block_costs(config)
    stages = cut_stages(costs, groups.num_stages, first, last)
    own = stages_of_rank(stages, groups.pipeline_rank, groups.pipeline_size, groups.virtual_size)
    models = [PretrainingModel(config, groups, stage) for stage in own]
    for model in models:
        set_recompute(model, config.train.recompute)
        if config.train.compile == "blocks":
            compile_blocks(model, device)
    module, _, name = ENGINES[config.parallel.engine].place.partition(":")
    make = getattr(importlib.import_module(module), name)  # here: an engine library takes seconds to import
    return make(models, config, device)
