"""MoE layers of every kind train equally in one process and over ranks: ten steps under the engine.

The tolerance is that of test_parity.py, for its reasons.
"""

from typing import Any

import pytest

from mmmoe_pretrain.config import MoEConfig
from tests.distributed import run_ranks
from tests.engines.test_parity import assert_equal, config_for, train

EVERY_LOSS = {"local_entropy": 0.01, "global_entropy": 0.01, "importance": 0.01, "load": 0.01, "balance": 0.01,
              "balance_scope": "global_batch", "z": 0.001, "orthogonality": 0.01,
              "per_modality": ["balance", "importance"]}  # fmt: skip
MOE_CASES = {
    "bias balancing by modality, shared and free experts": MoEConfig(
        router="sigmoid_top_k", num_experts=4, expert_hidden_size=8, shared_expert_hidden_size=8, identity_experts=1,
        null_experts=1, bias_balancing={"rate": 0.01, "per_modality": True}, losses=EVERY_LOSS, dispatch_chunks=2,
    ),
    "expert groups of unlike size, task-conditioned, Laplace gate": MoEConfig(
        num_experts=8, expert_hidden_size=8, gate="laplace", task_conditioned=True, losses=EVERY_LOSS,
        expert_groups=[{"modalities": ["image"], "num_experts": 2},
                       {"modalities": ["audio", "text"], "num_experts": 4},
                       {"num_experts": 2, "expert_hidden_size": 16}],
    ),
    "node groups in one layer, GELU experts of another number in the next": MoEConfig(
        every=1, num_experts=4, expert_hidden_size=8, router="group_limited", node_groups=2, groups_per_token=1,
        losses={"balance": 0.01, "balance_scope": "sequence"},
        layers={1: {"num_experts": 8, "router": "softmax_top_k", "node_groups": 1, "activation": "gelu",
                    "experts_per_token": 3}},
    ),
    "hash": MoEConfig(router="hash", num_experts=4, expert_hidden_size=8),
}  # fmt: skip


@pytest.mark.parametrize("name", MOE_CASES)
def test_mixtures_over_ranks_equal_one_process(tmp_path: Any, name: str) -> None:
    moe = {"moe": MOE_CASES[name]}
    single = run_ranks(1, train, config_for(tmp_path).model_copy(update=moe), 2)[0]
    many = run_ranks(2, train, config_for(tmp_path, 2).model_copy(update=moe), 2)
    assert single["history"][-1, 0] < 0.9 * single["history"][0, 0]
    assert_equal(many, single, rtol=5e-4)
