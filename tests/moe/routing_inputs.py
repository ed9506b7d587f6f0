"""Inputs for routers and statistics of routing, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import RouterInputs, Routing
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo

NAMES = StreamNames(("image", "audio", "text"), ("contrastive", "captioning"))
IMAGE, AUDIO, TEXT = range(3)
Rows = Sequence[Sequence[float]]


def logs(rows: Sequence[Sequence[float]]) -> Tensor:
    """Logits whose softmax is ``rows``."""
    return torch.tensor(rows).log()


def tokens_of(
    modalities: Sequence[int],
    tasks: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    segments: Sequence[int] | None = None,
) -> TokenInfo:
    """Tasks and segments are 0 and keys count up where not given."""
    n = len(modalities)
    made = (modalities, tasks or [0] * n, segments or [0] * n, keys or range(n))
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


def hand_stats(
    probability_ME: Rows,
    counts_ME: Rows,
    tokens_M: Sequence[float],
    entropy_M: Sequence[float] = (0, 0, 0),
    z_M: Sequence[float] = (0, 0, 0),
    load_ME: Rows | None = None,
    sequence: Sequence[float] = (0, 0),
    orthogonality: float = 0.0,
    allowed_ME: Rows | None = None,
) -> RoutingStats:
    """Statistics with the sums written down, all of the first task. Rows are image, audio, text."""
    probability_MXE, counts_MXE = _of_first_task(probability_ME), _of_first_task(counts_ME)
    experts = probability_MXE.shape[-1]
    return RoutingStats(
        probability_MXE=probability_MXE,
        entropy_MX=_of_first_task(entropy_M),
        z_MX=_of_first_task(z_M),
        counts_MXE=counts_MXE,
        tokens_MX=_of_first_task(tokens_M),
        dropped_MX=torch.zeros(3, len(NAMES.tasks)),
        load_ME=torch.zeros(3, experts) if load_ME is None else torch.tensor(load_ME, dtype=torch.float32),
        sequence_balance=torch.tensor(sequence, dtype=torch.float32),
        combination_C3=torch.zeros(0, 3),
        coactivation_MEE=torch.zeros(3, experts, experts),
        orthogonality=torch.tensor(orthogonality),
        names=NAMES,
        allowed_ME=torch.ones(3, experts).bool() if allowed_ME is None else torch.tensor(allowed_ME).bool(),
    )


def _of_first_task(rows: Rows | Sequence[float]) -> Tensor:
    values = torch.tensor(rows, dtype=torch.float32)
    return torch.stack([values] + [torch.zeros_like(values)] * (len(NAMES.tasks) - 1), dim=1)
