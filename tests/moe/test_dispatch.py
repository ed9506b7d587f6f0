"""All-to-all dispatch over 1, 2 and 4 ranks gives what one process gives."""

from typing import Any

import pytest
import torch

from mmmoe_pretrain.config import MoEConfig, ParallelConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

D, TOKENS = 8, 6  # tokens of a rank; rank 1 has none
CASES = [
    MoEConfig(num_experts=4, experts_per_token=1, expert_hidden_size=16),
    MoEConfig(num_experts=8, experts_per_token=2, expert_hidden_size=16),
    MoEConfig(num_experts=4, experts_per_token=4, expert_hidden_size=16),
]


def tokens_of(rank: int) -> torch.Tensor:
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(rank))
    return x[:0] if rank == 1 else x


def run(config: MoEConfig, groups: Groups, x: torch.Tensor) -> dict[str, Any]:
    """Output, and the gradients of a fixed sum of squares."""
    moe = MoELayer(config, D, 0, groups)
    init_parameters(moe, seed=5, num_layers=1)
    x = x.clone().requires_grad_()
    out, _ = moe(x, torch.zeros(x.shape[0], dtype=torch.int64))
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad, "router": moe.router.grad,
            "gate_up": moe.experts.gate_up.grad, "down": moe.experts.down.grad}  # fmt: skip


def rank_cases() -> list[dict[str, Any]]:
    results = []
    with process_group(timeout_minutes=0.5):
        for config in CASES:
            groups = build_groups(ParallelConfig(), config.num_experts)
            results.append({k: v.numpy() for k, v in run(config, groups, tokens_of(groups.data_rank)).items()})
            destroy_groups()
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_to_all_equals_local(world_size: int) -> None:
    ranks = run_ranks(world_size, rank_cases)
    x = torch.cat([tokens_of(rank) for rank in range(world_size)])
    for case, config in enumerate(CASES):
        whole = run(config, SINGLE, x)
        parts = [{k: torch.from_numpy(v) for k, v in rank[case].items()} for rank in ranks]
        # fp32 sums in another order: a few units in the last place of values around 1.
        close = {"rtol": 1e-5, "atol": 1e-6}
        for name in ("out", "x", "gate_up", "down"):  # tokens by rank, experts by rank
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], **close)
        torch.testing.assert_close(sum(part["router"] for part in parts), whole["router"], **close)
