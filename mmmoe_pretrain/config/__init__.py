"""One run is one YAML file, read into frozen typed models.

Owns the schema, its defaults and every check that needs no hardware: unknown keys, bad values
and combinations that cannot work. What depends on the number of ranks is checked in
``parallel/layout.py``. The README's tour explains the keys by example. A section is in the file
of its name; ``run.py`` has them all, and the checks between them.
"""

from mmmoe_pretrain.config.data import CacheConfig, DataConfig, SourceConfig
from mmmoe_pretrain.config.evaluate import HELD_OUT, EvaluateConfig
from mmmoe_pretrain.config.files import dump, load, parse
from mmmoe_pretrain.config.model import ModelConfig
from mmmoe_pretrain.config.moe import MoEConfig, RoutingLossConfig
from mmmoe_pretrain.config.optimizer import OptimizerConfig
from mmmoe_pretrain.config.parallel import ParallelConfig
from mmmoe_pretrain.config.run import RUN_NAME, RunConfig
from mmmoe_pretrain.config.train import CheckpointConfig, FaultsConfig, LossScaleConfig, TrainConfig

__all__ = [
    "HELD_OUT", "RUN_NAME", "CacheConfig", "CheckpointConfig", "DataConfig", "EvaluateConfig", "FaultsConfig",
    "LossScaleConfig", "MoEConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "RoutingLossConfig",
    "RunConfig", "SourceConfig", "TrainConfig", "dump", "load", "parse",
]  # fmt: skip
