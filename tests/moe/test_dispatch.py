"""Both dispatchers against a dense reference, and MoE layers over ranks against one process.

Every case runs on every rank beside its reference, in one process group for all of them. What a rank
expects: its own tokens through all experts; for expert gradients, the sum of that over the ranks.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmmoe_pretrain.config import MoEConfig, ParallelConfig
from mmmoe_pretrain.config.moe import ExpertGroupConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, make_dispatcher
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.moe.plain_experts import weighted_experts
from tests.moe.routing_inputs import NAMES

D, HIDDEN = 8, 16
TOKENS_OF_RANK = (7, 0, 5, 1)


@dataclass(frozen=True)
class Case:
    """``slots``: how tokens choose; see ``chosen_slots``."""

    experts: int
    top_k: int
    chunks: int = 1
    slots: str = "random"
    dtype: torch.dtype = torch.float32


CASES = [
    Case(4, 1),
    Case(8, 2, slots="all to the last"),
    Case(8, 2, slots="all nowhere"),
    Case(8, 2, chunks=2),
    Case(8, 8, chunks=3, slots="some nowhere"),
    Case(32, 8, chunks=99, slots="some nowhere"),
    Case(128, 1, chunks=2),
    Case(128, 8),
    Case(8, 2, dtype=torch.bfloat16),
    Case(8, 8, chunks=3, dtype=torch.bfloat16),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chosen_slots(case: Case, tokens: int, seed: int) -> Tensor:
    """[n, K], the slots of a token all different save where they are ``experts`` (nowhere)."""
    order = torch.rand(tokens, case.experts, generator=generator(seed)).argsort(-1)[:, : case.top_k]
    if case.slots == "all nowhere":
        return torch.full_like(order, case.experts)
    if case.slots == "all to the last":
        return torch.tensor([case.experts - 1, case.experts]).expand(tokens, 2)
    if case.slots == "some nowhere":
        order = order.masked_fill(torch.rand(order.shape, generator=generator(seed + 1)) < 0.4, case.experts)
    return order


def weights_of_all(case: Case) -> tuple[Tensor, Tensor]:
    draw = generator(9)
    up = torch.randn(case.experts, 2 * HIDDEN, D, generator=draw) / D**0.5
    down = torch.randn(case.experts, D, HIDDEN, generator=draw) / HIDDEN**0.5
    return up.to(case.dtype), down.to(case.dtype)


def through_dispatcher(case: Case, dispatcher: Dispatcher, local: range, x: Tensor, slots: Tensor, weights: Tensor):
    experts = Experts(local, D, HIDDEN, MoEConfig())
    up, down = weights_of_all(case)
    experts.up.data, experts.down.data = up[local.start : local.stop], down[local.start : local.stop]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out, beside, _ = dispatcher.run(x, slots, weights, experts, lambda: x * 2)
    (out.float().square().sum() + beside.float().sum()).backward()
    grads = {"x": x.grad, "weights": weights.grad, "up": experts.up.grad, "down": experts.down.grad}
    return {"out": out.detach(), **grads}


def loop_over_experts(case: Case, x: Tensor, slots: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """In fp32, whatever the type of the case."""
    up, down = (w.float().requires_grad_() for w in weights_of_all(case))
    x, weights = x.float().requires_grad_(), weights.clone().requires_grad_()
    out = weighted_experts(x, slots, weights, list(up), list(down), "swiglu")
    (out.square().sum() + (x * 2).sum()).backward()
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, "up": up.grad, "down": down.grad}


def check_dispatcher(case: Case, dispatcher: Dispatcher, groups: Groups, tokens: int, seed: int) -> None:
    x = torch.randn(tokens, D, generator=generator(seed)).to(case.dtype)
    slots = chosen_slots(case, tokens, seed)
    weights = torch.rand(slots.shape, generator=generator(seed + 7))
    local = groups.local_experts(case.experts)
    found = through_dispatcher(case, dispatcher, local, x, slots, weights)
    expected = loop_over_experts(case, x, slots, weights)
    for name in ("up", "down"):
        if groups.expert is not None:
            dist.all_reduce(expected[name], group=groups.expert)
        expected[name] = expected[name][local.start : local.stop]
    for name, value in expected.items():
        check_close(found[name], value, f"{case} {name}", case.dtype)


def check_close(found: Tensor, expected: Tensor, what: str, computed_in: torch.dtype = torch.float32) -> None:
    """Beside the largest value: sums of up to 64 terms in another order in fp32; and in bf16 eight
    roundings (up, h, y, the rank's sum, the token's sum, and three gradients) of 2^-9 each."""
    assert found.shape == expected.shape, what
    bound = 8 * 2**-9 if computed_in == torch.bfloat16 else 64 * 2**-24
    if expected.numel():
        worst = (found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert worst < bound, f"{what}: {worst:.1e} of the largest value, bound {bound:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_one_process_computes_the_weighted_sum_of_experts(case: Case, tokens: int) -> None:
    check_dispatcher(case, LocalDispatcher(case.experts), SINGLE, tokens, seed=1)
    check_dispatcher(case, AllToAllDispatcher(case.experts, SINGLE, case.chunks), SINGLE, tokens, seed=1)


def test_a_group_of_one_rank_needs_no_transport() -> None:
    assert isinstance(make_dispatcher(MoEConfig(num_experts=6), SINGLE), LocalDispatcher)


UNLIKE = (
    ExpertGroupConfig(modalities=("image",), num_experts=8, expert_hidden_size=24),
    ExpertGroupConfig(modalities=("audio", "text"), num_experts=4),
    ExpertGroupConfig(num_experts=4, expert_hidden_size=8),
)
LEND = {"threshold": 1, "min_rows": 1, "max_experts": 3}
BASE = MoEConfig(num_experts=8, expert_hidden_size=HIDDEN)
LAYERS: list[dict[str, Any]] = [
    {"num_experts": 128, "experts_per_token": 8, "dispatch_chunks": 2},
    {"capacity_factor": 0.6, "activation": "gelu"},
    {"capacity_factor": 0.6, "batch_priority": True, "dispatch_chunks": 3},
    {"num_experts": 16, "expert_groups": UNLIKE, "dispatch_chunks": 2},
    {"shared_expert_hidden_size": 12, "dispatch_chunks": 2},
    {"router": "sigmoid_top_k", "num_experts": 16, "node_groups": 4, "groups_per_token": 2},
    {"router": "expert_choice", "dispatch_chunks": 2},
    {"router": "noisy_top_k"},
    {"activation": "clamped_swiglu", "expert_biases": True, "router_bias": True, "dispatch_chunks": 2},
    {
        "router_weight_on_input": True,
        "expert_biases": True,
        "routed_scaling_factor": 2.5,
        "shared_expert_hidden_size": 12,
        "shared_expert_gate": True,
    },
    {"identity_experts": 2, "null_experts": 2, "experts_per_token": 4},
    {"lending": LEND, "num_experts": 128, "experts_per_token": 8},
    {"lending": LEND, "capacity_factor": 0.6, "shared_expert_hidden_size": 12},
    {"lending": LEND, "experts_per_token": 3, "activation": "clamped_swiglu", "expert_biases": True,
     "router_weight_on_input": True, "null_experts": 2},
    {"expert_attention_size": 4, "dispatch_chunks": 2, "shared_expert_hidden_size": 12},
    {"expert_attention_size": 4, "experts_per_token": 3, "lending": LEND, "capacity_factor": 0.6,
     "identity_experts": 2, "null_experts": 2},
]  # fmt: skip


def through_layer(config: MoEConfig, groups: Groups, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What belongs to this rank's tokens, and the gradients of the experts."""
    moe = MoELayer(config, D, 1, groups, NAMES)
    init_parameters(moe, seed=5, num_layers=1)
    for name, parameter in moe.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.05)
        elif name == "expert_attention.out.weight":  # 0 at the start
            parameter.data.normal_(generator=generator(11))
    x = x.clone().requires_grad_()
    out, _ = moe(x, TokenInfo.of_modalities(torch.arange(len(x)) % 3, NAMES))
    out.square().sum().backward()
    own = {"out": out.detach(), "x": x.grad}
    of_experts = {}
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on a rank of {x.shape[0]} tokens"
        (of_experts if name.startswith("experts.") else own)[name] = parameter.grad
    return own, of_experts


def check_layer(config: MoEConfig, groups: Groups) -> None:
    """Capacity is counted per rank, so the reference of a rank is one process with its tokens."""
    rank = groups.data_rank
    x = torch.randn(TOKENS_OF_RANK[rank], D, generator=generator(rank))
    own, of_experts = through_layer(config, groups, x)
    expected_own, expected_of_experts = through_layer(config, SINGLE, x)
    for name, value in expected_own.items():
        check_close(own[name], value, f"{config} {name}")
    for name, value in expected_of_experts.items():
        dist.all_reduce(value, group=groups.expert)
        here = groups.local_experts(value.shape[0])
        check_close(of_experts[name], value[here.start : here.stop], f"{config} {name}")


def all_cases() -> None:
    """Expert parallelism over 1, 2 and 4 of four ranks."""
    with process_group(timeout_minutes=0.5):
        for size in (1, 2, 4):
            groups = groups_of(ParallelConfig(expert_parallel_size=size), 4)
            rank = groups.data_rank
            for case in CASES:
                dispatcher = AllToAllDispatcher(case.experts, groups, case.chunks)
                check_dispatcher(case, dispatcher, groups, TOKENS_OF_RANK[rank], seed=rank)
            for override in LAYERS:
                check_layer(MoEConfig.model_validate({**BASE.model_dump(), **override}), groups)
            destroy_groups()


def test_ranks_compute_what_one_process_computes() -> None:
    run_ranks(4, all_cases)
