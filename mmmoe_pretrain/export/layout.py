"""What an export holds: files, names, shapes and types, computed from a config alone.

model-00001-of-00002.safetensors ...   weights by logical name, in full shape (experts [E, ...])
model.safetensors.index.json           {"metadata": {"total_size"}, "weight_map": {name: file}}
config.json                            format, step, sizes, and the run's whole config, whose "files" are here
tokenizer.model                        sentencepiece, where a modality reads text
modalities.NAME.npz ...                other files that entries of the config read, by setting in "files"
README.md                              the model card
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.models.block import is_sparse
from mmmoe_pretrain.models.pretraining import PretrainingModel

FORMAT, VERSION = "mmmoe", 2
CONFIG, INDEX, TOKENIZER, CARD = "config.json", "model.safetensors.index.json", "tokenizer.model", "README.md"
FILE_BYTES = 5_000_000_000  # of a file of weights, unless one tensor is larger
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """One logical tensor. ``trained``: a parameter; the others are state that training keeps (router biases)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def weights_of(config: RunConfig, dtype: str = "fp32") -> list[Weight]:
    """Every tensor of the model, in its order; no memory is taken for them. Buffers of objectives are not among them:
    they hold features of the samples that training saw last.

    ``dtype`` bf16 is what training in bf16 computes with: the trunk's matrices and the language head.
    Vectors, routers, embedders, fusion modules and joint heads stay fp32 there and here.
    """
    with torch.device("meta"):
        model = PretrainingModel(config)
    if dtype != "fp32":
        model.use_half(DTYPES[dtype])
    parameters = [Weight(n, tuple(p.shape), p.dtype, True) for n, p in model.named_parameters()]
    buffers = {f"mmmoe.{name}": buffer for name, buffer in persistent_buffers(model.mmmoe).items()}
    return parameters + [Weight(n, tuple(b.shape), b.dtype, False) for n, b in buffers.items()]


def in_files(weights: list[Weight], file_bytes: int = FILE_BYTES) -> dict[str, list[Weight]]:
    """File names -> the tensors of each, in order; none is larger than ``file_bytes`` unless it holds one
    tensor alone."""
    groups: list[list[Weight]] = []
    room = 0
    for weight in weights:
        if not groups or weight.bytes > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(weight)
        room -= weight.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def parameter_counts(config: RunConfig, weights: list[Weight]) -> tuple[int, int]:
    """All trained numbers, and those that one token meets: of an MoE layer of E outputs K experts of mean size, of
    all else everything, embedding tables included. Experts without computation among the K make it an upper bound of
    what is computed."""
    total = sum(weight.numel for weight in weights if weight.trained)
    idle = 0.0
    for index, moe in sparse_blocks(config):
        experts = sum(w.numel for w in weights if f".blocks.{index}.ffn.experts." in w.name)
        idle += experts * (1 - min(1.0, moe.experts_per_token / moe.router_outputs))
    return total, round(total - idle)


def sparse_blocks(config: RunConfig) -> Iterator[tuple[int, MoEConfig]]:
    """Index and settings of each MoE layer."""
    for index in range(config.model.num_layers):
        if is_sparse(config.moe, index):
            yield index, config.moe.for_layer(index)
