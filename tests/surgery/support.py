"""Checkpoints with random weights and moments in memory, and a comparison of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.surgery.operation import Result, Source
from mmmoe_pretrain.surgery.parameters import State, by_parameter
from tests.export.support import random_state
from tests.support import random_batch, tiny_config

MODEL = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
META = {"vocab_size": 48, "tokenizer_fingerprint": "none", "version": "0"}
STEP = 5
BLOCK = "mmmoe.trunk.blocks.1.ffn."  # the first of two MoE layers


def random_source(root: Path, moe: dict[str, Any], **sections: Any) -> Source:
    """Random weights and optimizer state, as if read from a run under ``root``; biases of bias balancing are 0."""
    values = {"num_experts": 4, "expert_hidden_size": 8, **moe}
    config = tiny_config(root, moe=values, model=MODEL, **sections)
    state = by_parameter(random_state(config, seed=0))
    for name, parameter in state.items():
        if ".router.bias." in name:
            parameter.value.zero_()
    return source_of(root, config, state)


def source_of(root: Path, config: RunConfig, state: State) -> Source:
    return Source(root / "old", config, model_of(config, state), STEP, META, state)


def after(source: Source, result: Result) -> Source:
    """The result as the source of another operation."""
    return source_of(source.run_dir.parent, result.config, result.state)


def model_of(config: RunConfig, state: State) -> MMMoE:
    """The model in eval mode. Fails unless names, shapes and moments are those of the config's model."""
    model = PretrainingModel(config)
    parameters, buffers = dict(model.named_parameters()), persistent_buffers(model)
    assert state.keys() == parameters.keys() | buffers.keys()
    for name, parameter in state.items():
        assert parameter.optimizer.keys() == (set(config.optimizer.state) if name in parameters else set()), name
        assert all(kept.shape == parameter.value.shape for kept in parameter.optimizer.values()), name
        (parameters | buffers)[name].data.copy_(parameter.value)
        assert (parameters | buffers)[name].shape == parameter.value.shape, name
    return model.mmmoe.eval()


def batch_for(config: RunConfig) -> Batch:
    return random_batch(config, ["iat", "it", "at", "ia"] * 4, seed=3)


def outputs(model: MMMoE, batch: Batch) -> Tensor:
    """All features and likelihoods in one vector."""
    output, _ = model(batch)
    features = (output.features[name].reshape(-1) for name in sorted(output.features))
    return torch.cat([*features, *output.token_nll.values()])


def difference(source: Source, result: Result, batch: Batch | None = None) -> float:
    """Largest, of outputs of the order of 1."""
    batch = batch or batch_for(source.config)
    with torch.inference_mode():
        before, now = outputs(source.model, batch), outputs(model_of(result.config, result.state), batch)
    return float((before - now).abs().max())


def assert_same_function(source: Source, result: Result, batch: Batch | None = None) -> None:
    """fp32 sums in another order: 1e-5 is ten times what they leave in four blocks of width 16, and a
    thousandth of what a wrong factor does."""
    assert difference(source, result, batch) < 1e-5


def gradients(model: MMMoE, batch: Batch) -> dict[str, Tensor]:
    """Of a fixed linear function of the outputs, by logical name."""
    model.zero_grad()
    vector = outputs(model, batch)
    (vector * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {f"mmmoe.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moments(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[name].optimizer["exp_avg"], state[name].optimizer["exp_avg_sq"]
