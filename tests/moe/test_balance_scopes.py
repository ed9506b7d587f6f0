"""Losses over ranks, microbatches, segments and padding: the layout must not show."""

from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.losses import BalanceWindow, reduce_stats, routing_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import Group
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.moe.routing_inputs import NAMES

D, RANKS, MICROBATCHES = 6, 2, 2
GROUPS = [{"modalities": ["image"], "num_experts": 2}, {"modalities": ["text", "audio"], "num_experts": 3},
          {"modalities": ["image", "audio", "text"], "num_experts": 1}]  # fmt: skip
# Modalities of the tokens by [microbatch][rank]: different numbers, one rank without text, one with nothing.
MODALITIES_OF = [[[0, 0, 1, 2, 2, 2, 0], [0, 1, 0]], [[2, 2, 1, 0, 2], []]]
TERMS: dict[str, dict[str, Any]] = {
    "importance": {"importance": 1},
    "importance by modality": {"importance": 1, "per_modality": ["importance"]},
    "load": {"load": 1},
    "load by modality": {"load": 1, "per_modality": ["load"]},
    "balance": {"balance": 1},
    "balance by modality": {"balance": 1, "per_modality": ["balance"]},
    "balance of segments": {"balance": 1, "balance_scope": "sequence"},
    "balance of the global batch": {"balance": 1, "balance_scope": "global_batch"},
    "balance of the global batch by modality": {
        "balance": 1, "balance_scope": "global_batch", "per_modality": ["balance"]},
    "z": {"z": 1},
    "z by modality": {"z": 1, "per_modality": ["z"]},
    "local entropy": {"local_entropy": 1},
    "global entropy": {"global_entropy": 1},
    "global entropy above a threshold": {"global_entropy": 1, "min_experts": {"image": 2, "audio": 3, "text": 3}},
    "orthogonality": {"orthogonality": 1},
}  # fmt: skip
CASES = [(name, groups) for name in TERMS for groups in ("free", "groups")]


def case_config(name: str, groups: str) -> MoEConfig:
    return MoEConfig.model_validate({
        "every": 1, "num_experts": 6, "experts_per_token": 2, "losses": TERMS[name],
        "expert_groups": GROUPS if groups == "groups" else [],
        "layers": {} if groups == "groups" else {1: {"num_experts": 4, "experts_per_token": 1}}})  # fmt: skip


def make_routers(config: MoEConfig) -> list[Router]:
    """Two layers, of 6 and 4 experts where no groups are."""
    routers = [Router(config.for_layer(layer), D, layer, NAMES) for layer in range(2)]
    for layer, router in enumerate(routers):
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(layer))
    return routers


def part(microbatch: int, rank: int) -> tuple[torch.Tensor, TokenInfo]:
    """The tokens of a rank in a microbatch; its segments have up to three tokens."""
    modalities = torch.tensor(MODALITIES_OF[microbatch][rank], dtype=torch.int64)
    n = modalities.numel()
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(10 * microbatch + rank))
    segments = 100 * rank + torch.arange(n) // 3
    return x, TokenInfo(modalities, torch.arange(n) % 2, segments, torch.arange(n), NAMES)


def together(parts: list[tuple[torch.Tensor, TokenInfo]]) -> tuple[torch.Tensor, TokenInfo]:
    infos = [info for _, info in parts]
    return torch.cat([x for x, _ in parts]), TokenInfo(
        *(torch.cat([getattr(info, name) for info in infos])
          for name in ("modality_ids_n", "task_ids_n", "segment_ids_n", "keys_n")), names=NAMES)  # fmt: skip


def step(
    config: MoEConfig, microbatches: list[tuple[torch.Tensor, TokenInfo]], group: Group
) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """One optimizer step: each microbatch's losses by name, and the gradient of their mean by layer."""
    routers, window = make_routers(config), BalanceWindow()
    values = []
    for x, tokens in microbatches:
        stats = reduce_stats([router(x, tokens).stats for router in routers], group)
        losses = routing_losses(stats, config.losses, window.add(stats))
        (sum(losses.values()) / len(microbatches)).backward()
        values.append({name: loss.item() for name, loss in losses.items()})
    return values, [router.weight.grad.numpy() for router in routers]


def rank_steps() -> list[Any]:
    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 4)
        results = []
        for name, masks in CASES:
            parts = [part(m, groups.data_rank) for m in range(MICROBATCHES)]
            results.append(step(case_config(name, masks), parts, groups.data))
        destroy_groups()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    return run_ranks(RANKS, rank_steps)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}, {masks}" for name, masks in CASES])
def test_two_ranks_with_two_microbatches_each_give_what_one_process_gives(case: int, ranks: list[list[Any]]) -> None:
    name, masks = CASES[case]
    whole = [together([part(m, rank) for rank in range(RANKS)]) for m in range(MICROBATCHES)]
    values, gradients = step(case_config(name, masks), whole, None)
    for rank in ranks:
        for microbatch in range(MICROBATCHES):
            assert rank[case][0][microbatch] == pytest.approx(values[microbatch], rel=1e-5, abs=1e-6)
    for layer, gradient in enumerate(gradients):
        mean = sum(rank[case][1][layer] for rank in ranks) / RANKS  # what data parallelism does to gradients
        # fp32 sums in another order: a few units in the last place of values around 1.
        np.testing.assert_allclose(mean, gradient, rtol=1e-4, atol=1e-6)
        assert np.abs(gradient).max() > 1e-3, "a gradient of nothing proves nothing"
