"""Inputs for routers, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import RouterInputs, Routing
from mmmoe_pretrain.moe.tokens import TokenInfo

NAMES = StreamNames(("image", "audio", "text"), ("contrastive", "captioning"))
IMAGE, AUDIO, TEXT = range(3)


def logs(rows: Sequence[Sequence[float]]) -> Tensor:
    """Logits whose softmax is ``rows``."""
    return torch.tensor(rows).log()


def tokens_of(
    modalities: Sequence[int], tasks: Sequence[int] | None = None, keys: Sequence[int] | None = None
) -> TokenInfo:
    """Tokens of one segment; tasks are 0 and keys count up where not given."""
    n = len(modalities)
    made = (modalities, tasks or [0] * n, [0] * n, keys or range(n))
    return TokenInfo(*(torch.tensor(list(values), dtype=torch.int64) for values in made), names=NAMES)


def inputs_of(
    logits: Tensor, tokens: TokenInfo | None = None, bias: Sequence[float] | None = None, **settings: object
) -> RouterInputs:
    """Image tokens with these logits; ``settings`` are of the MoEConfig."""
    config = MoEConfig(num_experts=logits.shape[1], **settings)
    tokens = tokens or tokens_of([IMAGE] * logits.shape[0])
    return RouterInputs(logits, tokens, config, None if bias is None else torch.tensor([bias]))


def identity_router(num_experts: int, **settings: object) -> Router:
    """A router whose logits are its input: D = E and the weight is the identity (linear gate)."""
    router = Router(MoEConfig(num_experts=num_experts, **settings), num_experts, layer=1, names=NAMES)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def dense_weights(routing: Routing, num_experts: int) -> Tensor:
    """[n, E] weights, 0 where an expert does not serve."""
    n = routing.expert_ids_nK.shape[0]
    return torch.zeros(n, num_experts).scatter_add(1, routing.expert_ids_nK, routing.weights_nK.detach())
