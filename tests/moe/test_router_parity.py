"""Decisions, weights and gradients against megatron-core's TopKRouter, same weights and same tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.engines import megatron_cpu
from mmmoe_pretrain.moe.losses import layer_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.moe.routing_inputs import NAMES, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

N, D, E = 48, 16, 8
SIGMOID = {"moe_router_score_function": "sigmoid"}


class OneRank:
    """A group of this process alone: megatron-core asks for its size and communicates nothing."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def peer_router(top_k: int, **settings: Any) -> torch.nn.Module:
    """A TopKRouter in training, in fp32."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    megatron_cpu.install()  # for the modules that the import above has added

    class OnItsDevice(TopKRouter):
        def gating(self, input: Tensor) -> Tensor:
            """The original moves its weight to CUDA and multiplies by Transformer Engine."""
            return F.linear(input, self.weight)

    config = TransformerConfig(
        num_layers=1, hidden_size=D, num_attention_heads=1, num_moe_experts=E, moe_router_topk=top_k,
        use_cpu_initialization=True, add_bias_linear=False, moe_ffn_hidden_size=D,
        **{"moe_aux_loss_coeff": 0.0, **settings},
    )  # fmt: skip
    alone = OneRank()
    router = OnItsDevice(config, SimpleNamespace(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone))
    router.set_layer_number(1)
    return router


def peer_loss_values() -> dict[str, float]:
    """The unweighted losses that megatron-core logged since the last call."""
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

    values = {name: float(entry["values"][0]) for name, entry in get_moe_layer_wise_logging_tracker().items()}
    clear_aux_losses_tracker()
    return values


def compare(ours: dict[str, Any], theirs: dict[str, Any], bias: Tensor | None = None) -> dict[str, float]:
    """Asserts equal maps, weights and gradients of a random sum of the weights plus the auxiliary losses;
    returns megatron-core's losses beside ours, by name."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(E, D, generator=generator), torch.randn(N, D, generator=generator)
    target = torch.randn(N, E, generator=generator)
    mine = Router(MoEConfig(**{"num_experts": E, "losses": {}, **ours}), D, layer=0, names=NAMES)
    peer = peer_router(ours.get("experts_per_token", 2), **theirs)
    with torch.no_grad():
        mine.weight.copy_(weight)
        peer.weight.copy_(weight)
    if bias is not None:
        mine.bias.get_buffer("all").copy_(bias)
        peer.expert_bias.copy_(bias)

    my_x, peer_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    routing = mine(my_x, tokens_of([0] * N))
    kept = torch.zeros(N, E).scatter_add(1, routing.expert_ids_nK, routing.kept_nK.float())
    weights = torch.zeros(N, E).scatter_add(1, routing.expert_ids_nK, routing.weights_nK)
    losses = layer_losses(routing.stats, mine.config.losses)
    ((weights * target).sum() + sum(losses.values())).backward()

    peer_weights, peer_map = peer(peer_x.view(N, 1, D))
    (peer_weights * target).sum().backward()  # its losses are attached to the weights and logits

    assert torch.equal(kept.bool(), peer_map)
    # The same formulas in fp32, in another order: a few roundings of 1e-7, summed over 48 tokens in gradients.
    torch.testing.assert_close(weights, peer_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(my_x.grad, peer_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.weight.grad, peer.weight.grad, rtol=1e-4, atol=1e-5)
    assert mine.weight.grad.abs().max() > 0.01
    return {**peer_loss_values(), **{name: float(loss) for name, loss in losses.items()}}


GROUPS = {"router": "group_limited", "node_groups": 4, "renormalize": False}
# With K > 1 megatron-core lets second choices compete with first ones, and ours wait: K = 1 compares.
FULL = {"experts_per_token": 1, "batch_priority": True}
THEIR_FULL = {"moe_token_drop_policy": "probs", "moe_token_dispatcher_type": "alltoall"}
BEFORE, AFTER = {"moe_router_pre_softmax": True}, {"moe_router_pre_softmax": False}  # softmax, the choice


@pytest.mark.parametrize("ours,theirs", [
    *(({"experts_per_token": k}, AFTER) for k in (2, 4, 8)),
    *(({"experts_per_token": k, "renormalize": False}, BEFORE) for k in (1, 2)),
    *(({"experts_per_token": k, "router": "sigmoid_top_k"}, SIGMOID) for k in (1, 2, 4)),
    *(({**GROUPS, "experts_per_token": k, "groups_per_token": groups},
       {**BEFORE, "moe_router_num_groups": 4, "moe_router_group_topk": groups})
      for k, groups in ((2, 1), (2, 2), (4, 2))),
    *(({**FULL, "capacity_factor": c}, {**BEFORE, **THEIR_FULL, "moe_expert_capacity_factor": c})
      for c in (0.5, 1.0, 2.0)),
], ids=str)  # fmt: skip
def test_decisions_weights_and_gradients(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    compare(ours, theirs)


def test_sigmoid_scores_with_a_bias_on_the_choice() -> None:
    ours = {"router": "sigmoid_top_k", "bias_balancing": {"rate": 1e-3}}
    compare(ours, {**SIGMOID, "moe_router_enable_expert_bias": True}, torch.linspace(-0.4, 0.4, E))


@pytest.mark.parametrize("router,score", [("softmax_top_k", "softmax"), ("sigmoid_top_k", "sigmoid")])
def test_balance_and_z_losses(router: str, score: str) -> None:
    ours = {"router": router, "losses": {"balance": 0.5, "z": 0.25}}
    theirs = {"moe_router_score_function": score, "moe_router_load_balancing_type": "aux_loss",
              "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.25}  # fmt: skip

    def rank() -> dict[str, float]:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
        with process_group(timeout_minutes=1):  # balance asks torch.distributed
            return compare(ours, theirs)

    (values,) = run_ranks(1, rank)
    assert values["balance"] == pytest.approx(0.5 * values["load_balancing_loss"], rel=1e-6)
    assert values["z"] == pytest.approx(0.25 * values["z_loss"], rel=1e-6)
    assert values["z"] > 0.1 and values["balance"] > 0.5  # 0.5 is even
