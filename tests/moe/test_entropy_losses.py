"""LIMoE's entropy losses at work: routers that learn from them alone."""

from typing import Any

import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.losses import routing_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.moe.routing_inputs import NAMES

EXPERTS, THRESHOLD, D = 8, 3, 16
CONFIDENT = {"local_entropy": 0.5}
SPREAD = {"global_entropy": 0.5, "min_experts": dict.fromkeys(NAMES.modalities, float(THRESHOLD))}


def train(losses: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By modality, after 200 steps: the experts in use (exponential of the entropy of its mean routing), and the
    mean entropy of a token's own routing in nats."""
    router = Router(MoEConfig(num_experts=EXPERTS, experts_per_token=1, losses=losses), D, 0, NAMES)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, std=0.02, generator=generator)
    common_MD = torch.randn(3, D, generator=generator)  # what the tokens of a modality share
    optimizer = torch.optim.AdamW(router.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(200):
        modality_ids_n = torch.arange(192) % 3
        x_nD = common_MD[modality_ids_n] + torch.randn(192, D, generator=generator)
        stats = router(x_nD, TokenInfo.of_modalities(modality_ids_n, NAMES)).stats
        optimizer.zero_grad()
        sum(routing_losses([stats], router.config.losses).values()).backward()
        optimizer.step()
    used = torch.special.entr(stats.probability_ME / stats.tokens_M[:, None]).sum(1).exp()
    return used.tolist(), (stats.entropy_M / stats.tokens_M).tolist()


def test_confidence_alone_collapses_a_modality_onto_one_expert() -> None:
    used, uncertainty = train(CONFIDENT)
    assert max(used) < 1.2  # single modalities of three seeds ended at 1.0 to 1.35
    assert max(uncertainty) < 0.35


def test_with_both_losses_every_modality_uses_its_threshold_of_experts_and_tokens_are_sure() -> None:
    used, uncertainty = train(CONFIDENT | SPREAD)
    assert min(used) > 0.9 * THRESHOLD  # a soft threshold: three seeds ended at 2.9 to 3.7
    assert max(uncertainty) < 0.35, "an even choice between two experts has 0.69"
