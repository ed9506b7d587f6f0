"""A run's folder as training leaves it, with random weights: nothing has to be trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import ParameterState, persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.modalities import TextCodec
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import tiny_config

State = dict[str, ParameterState]


def make_run(
    root: Path, data: Path, steps: tuple[int, ...] = (10,), **sections: Any
) -> tuple[RunConfig, dict[int, State]]:
    """The config of a run under ``root`` over the shards in ``data``, and the state of each of its checkpoints."""
    where = {"train": [{"path": str(data / "train")}], "tokenizer": str(data / "tokens.model"), "num_workers": 0}
    config = tiny_config(root, **{"data": where, **sections})
    config.run_dir.mkdir(parents=True)
    run_config.dump(config, config.run_dir / "config.yaml")
    codec = TextCodec(config.data.tokenizer, config.modalities.text)
    states = {}
    for step in steps:
        states[step] = random_state(config, codec.vocab_size, seed=step)
        meta = {"version": "0", "vocab_size": codec.vocab_size, "tokenizer_fingerprint": codec.fingerprint,
                "config": config.model_dump(mode="json"), "progress": Progress(step, step).to_json(),
                "seed": config.seed, "skipped_batches": []}  # fmt: skip
        store.write_state(config.checkpoint_root, step, states[step], meta)
    return config, states


def random_state(config: RunConfig, vocab_size: int, seed: int) -> State:
    """Normal weights (std 0.3), moments that are not zero; router biases of mean zero, as training keeps them."""
    torch.manual_seed(seed)
    model = PretrainingModel(config, vocab_size)
    state: State = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        state[name] = ParameterState(0.3 * torch.randn(shape), torch.randn(shape), torch.rand(shape))
    for name, buffer in persistent_buffers(model).items():
        noise = torch.rand(buffer.shape)
        state[name] = ParameterState(noise - noise.mean(-1, keepdim=True), None, None)
    return state


def copied(folder: Path, to: Path) -> Path:
    """A copy of an export, to be damaged."""
    shutil.copytree(folder, to)
    return to
