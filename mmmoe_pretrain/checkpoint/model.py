"""A trained model from a run's folder, whole, in one process."""

from __future__ import annotations

from pathlib import Path

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.checkpoint.store import find_latest, load_weights, read_meta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.mmmoe import MMMoE

CONFIG = "config.yaml"


def load_model(run_dir: Path) -> tuple[MMMoE, RunConfig, int]:
    """The model of the newest checkpoint in eval mode and fp32, its config and its step.

    Raises ValueError where the folder holds no finished checkpoint.
    """
    checkpoint = find_latest(run_dir)
    if checkpoint is None or not (run_dir / CONFIG).is_file():
        raise ValueError(
            f"no finished checkpoint in {run_dir}; give the folder of a run that saved one, e.g. runs/demo"
        )
    config = run_config.load(run_dir / CONFIG)
    meta = read_meta(checkpoint)
    model = MMMoE(config, vocab_size=meta["vocab_size"])
    weights = {name: p.data for name, p in model.named_parameters()} | persistent_buffers(model)
    load_weights(checkpoint, {f"mmmoe.{name}": tensor for name, tensor in weights.items()})
    return model.eval(), config, meta["step"]
