"""Initial weights that depend on the seed and the parameter's logical name alone.

So every layout starts from the same model: a rank that holds experts 4 to 7, or a part of a matrix,
draws what one process would have drawn and keeps its own.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, part_of, placements

RESIDUAL_OUTPUTS = re.compile(
    r"(attention\.out|ffn\.down|ffn\.shared\.down)\.weight$|ffn\.experts\.(stacks\.\d+\.)?down$"
)
# Noisy top-k starts with the same noise for all, attention among experts and a routing memory without effect.
ZERO_AT_START = ("noise_weight", "expert_attention.out.weight", "router.memory.logits.weight")
EMBEDDING_STD = 0.02
TABLES = ("modality_embedding", "mask_embedding", "task_embedding")  # of rows by name


def init_parameters(
    model: nn.Module, seed: int, num_layers: int, stream_name: Callable[[str], str] = lambda name: name
) -> None:
    """Overwrite every parameter: matrices normal with variance 1 / fan-in (those that write into the residual stream
    divided by sqrt(2 num_layers), as in GPT-2), embeddings normal with ``EMBEDDING_STD``, biases zero, scales one.
    ``stream_name`` maps a parameter's name to the key of its random numbers. Nothing to do on the device ``meta``.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    # an embedding, cut or not, has this attribute
    tables = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "num_embeddings")}
    cuts = placements(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = experts.get(name.rpartition(".")[0])
            if owner is not None:
                _init_experts(parameter, cuts[name], name, owner.local_experts, seed, num_layers)
            elif name.endswith(ZERO_AT_START):
                parameter.zero_()
            elif parameter.ndim >= 2:
                shape = logical_shape(tuple(parameter.shape), cuts[name])
                std = EMBEDDING_STD if name in tables or _is_table(name) else math.prod(shape[1:]) ** -0.5
                whole = _normal(shape, std * _residual_scale(name, num_layers), f"{seed}/{stream_name(name)}")
                parameter.copy_(part_of(whole, cuts[name]))
            elif name.endswith("bias"):
                parameter.zero_()


def _init_experts(
    parameter: Tensor, placement: Placement, name: str, owned: range, seed: int, num_layers: int
) -> None:
    if is_vector(parameter):  # biases
        parameter.zero_()
        return
    within = tuple(cut for cut in placement if cut.dim > 0)  # of one expert
    _, *shape = logical_shape(tuple(parameter.shape), within)
    std = shape[-1] ** -0.5 * _residual_scale(name, num_layers)
    for local, index in enumerate(owned):
        whole = _normal((1, *shape), std, f"{seed}/{name}/{index}")
        parameter[local].copy_(part_of(whole, within)[0])


def _is_table(name: str) -> bool:
    return name.endswith("positions") or any(f"{table}." in name for table in TABLES)


def _residual_scale(name: str, num_layers: int) -> float:
    return (2 * num_layers) ** -0.5 if RESIDUAL_OUTPUTS.search(name) else 1.0


def _normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(shape, generator=generator) * std
