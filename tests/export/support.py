"""A run's folder as training leaves it, with random weights: nothing has to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import WholeState, model_key, optimizer_key, persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import tiny_config

State = WholeState


def make_run(
    root: Path, data: Path, steps: tuple[int, ...] = (10,), **sections: Any
) -> tuple[RunConfig, dict[int, State]]:
    """The config of a run under ``root`` over the shards in ``data``, and the state of each of its checkpoints."""
    where = {"train": [{"path": str(data / "train")}], "tokenizer": str(data / "tokens.model"), "num_workers": 0}
    config = tiny_config(root, **{"data": where, **sections})
    return config, write_run(config, build_modalities(config.modalities, config.data.tokenizer), steps)


def write_run(config: RunConfig, modalities: Modalities, steps: tuple[int, ...]) -> dict[int, State]:
    """The config, and checkpoints of these steps; the state of each. ``modalities`` know the tokenizer."""
    states = {}
    for step in steps:
        states[step] = random_state(config, seed=step)
        write_checkpoint(config, modalities, step, states[step])
    return states


def write_checkpoint(config: RunConfig, modalities: Modalities, step: int, state: State) -> None:
    """The config, if it is the first, and this checkpoint."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    run_config.dump(config, config.run_dir / "config.yaml")
    meta = {"version": "0", "vocab_size": modalities.vocab_size, "tokenizer_fingerprint": modalities.fingerprint,
            "config": config.model_dump(mode="json"), "progress": Progress(step, step).to_json(),
            "seed": config.seed, "skipped_batches": []}  # fmt: skip
    store.write_state(config.checkpoint_root, step, state, meta)


def random_state(config: RunConfig, seed: int) -> State:
    """Normal weights (std 0.3), optimizer state that is not zero; router biases of mean zero, as training keeps
    them."""
    torch.manual_seed(seed)
    model = PretrainingModel(config)
    state: State = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        state[model_key(name)] = 0.3 * torch.randn(shape)
        for kept in config.optimizer.state:
            state[optimizer_key(name, kept)] = torch.rand(shape) if kept == "exp_avg_sq" else torch.randn(shape)
    for name, buffer in persistent_buffers(model).items():
        noise = torch.rand(buffer.shape)
        state[model_key(name)] = noise - noise.mean(-1, keepdim=True)
    return state
