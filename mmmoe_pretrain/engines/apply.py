"""From a config to a running engine: the one place where the order of application shows.

Groups exist (``parallel/mesh.py``) -> the model is built for them, experts cut by the expert
group -> precision -> the engine wraps it (data parallelism, optimizer).
"""

from __future__ import annotations

import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.engines.megatron import MegatronEngine
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.groups import Groups

ENGINES = {"megatron": MegatronEngine}


def build_engine(config: RunConfig, vocab_size: int, groups: Groups, device: torch.device) -> Engine:
    """The engine that ``parallel.engine`` names, around a freshly initialised model."""
    model = PretrainingModel(config, vocab_size, groups)
    return ENGINES[config.parallel.engine](model, config, device)
