"""Initial weights that depend on the seed and the parameter's logical name alone.

Every layout then starts from the same model: a rank that holds experts 4 to 7 draws exactly
what one process would have drawn for them.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from mmmoe_pretrain.moe.experts import Experts

RESIDUAL_OUTPUTS = re.compile(
    r"(attention\.out|ffn\.down|ffn\.shared\.down)\.weight$|ffn\.experts\.(stacks\.\d+\.)?down$"
)
EMBEDDING_STD = 0.02


def init_parameters(model: nn.Module, seed: int, num_layers: int) -> None:
    """Overwrite every parameter: matrices normal with variance 1 / fan-in (those that write into
    the residual stream divided by sqrt(2 num_layers), as in GPT-2), embeddings normal with
    ``EMBEDDING_STD``, biases zero, scales one. What an objective brings keeps its own value.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = experts.get(name.rpartition(".")[0])
            if owner is not None:
                _init_experts(parameter, name, owner.local_experts, seed, num_layers)
            elif name.endswith("noise_weight"):  # noisy top-k starts with the same noise for all
                parameter.zero_()
            elif parameter.ndim >= 2:
                std = EMBEDDING_STD if name in tables or _is_table(name) else _fan_in_std(parameter)
                _normal_(parameter, std * _residual_scale(name, num_layers), f"{seed}/{name}")
            elif name.endswith("bias"):
                parameter.zero_()


def _init_experts(parameter: Tensor, name: str, owned: range, seed: int, num_layers: int) -> None:
    std = parameter.shape[2] ** -0.5 * _residual_scale(name, num_layers)
    for local, index in enumerate(owned):
        _normal_(parameter[local], std, f"{seed}/{name}/{index}")


def _is_table(name: str) -> bool:
    return name.endswith(("positions", "position_embedding", "task_embedding"))


def _fan_in_std(parameter: Tensor) -> float:
    return math.prod(parameter.shape[1:]) ** -0.5


def _residual_scale(name: str, num_layers: int) -> float:
    return (2 * num_layers) ** -0.5 if RESIDUAL_OUTPUTS.search(name) else 1.0


def _normal_(tensor: Tensor, std: float, key: str) -> None:
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
