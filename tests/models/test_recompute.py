"""Recomputation changes what is kept and nothing else: losses and gradients are equal bit for bit.

They can be, since the backward pass repeats the forward pass with the same operations on the same
shapes, in an order that is the graph's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig, ParallelConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.models.attention import StreamPlan, plan_stream
from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.models.recompute import recompute_experts, run_block
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.parallel.tensor import enter_trunk
from tests.distributed import groups_of, run_ranks
from tests.models.saved import saved_bytes
from tests.moe.routing_inputs import NAMES
from tests.support import random_batch, tiny_config

MODEL = ModelConfig(hidden_size=16, num_layers=3, num_heads=2, ffn_hidden_size=24)
D, FF, EXPERTS = 16, 40, 4
MODES = ("none", "experts", "blocks")
MOE_CASES = {
    "noise": {"router": "noisy_top_k", "jitter": 0.1, "experts_per_token": 2},
    "all": {"capacity_factor": 0.8, "shared_expert_hidden_size": 8, "identity_experts": 1, "dispatch_chunks": 2,
            "experts_per_token": 2},
    "top-1 in grouped products": {"expert_backend": "grouped_mm", "experts_per_token": 1},
}  # fmt: skip


class Stack(nn.Module):
    """A dense, a sparse and a dense block."""

    def __init__(self, groups: Groups = SINGLE, **settings: object) -> None:
        super().__init__()
        self.groups = groups
        moe = MoEConfig(**{"num_experts": EXPERTS, "expert_hidden_size": FF, "every": 2, **settings})
        self.blocks = nn.ModuleList(Block(MODEL, moe, i, groups, NAMES) for i in range(MODEL.num_layers))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def set_mode(self, mode: str) -> None:
        self.recompute = mode == "blocks"
        for module in self.modules():
            if isinstance(module, Experts):
                module.recompute = False
        if mode == "experts":
            recompute_experts(self)

    def run(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, RoutingStats]:
        """The hidden states, and the sums of the one MoE layer."""
        found, x_nD = [], enter_trunk(x_nD, self.groups)
        for block in self.blocks:
            x_nD, stats = run_block(block, x_nD, plan, self.recompute)
            found.append(stats)
        assert found[0] is None and found[2] is None
        return x_nD, found[1]

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> Tensor:
        """A loss of the hidden states and of every sum of routing that has a gradient."""
        out_nD, stats = self.run(x_nD, plan)
        flat = torch.cat([stats.flatten(), stats.orthogonality[None]])
        return (flat * torch.linspace(-1, 1, flat.numel())).sum() + (out_nD * torch.linspace(-1, 1, D)).square().sum()


def make_input(root: Path, draw: int = 0, seed: int = 0, samples: int = 6) -> tuple[Tensor, StreamPlan]:
    batch = random_batch(tiny_config(root), ["iat", "it", "a", "t", "ia", "at"][:samples], seed=seed)
    plan = plan_stream(batch, NAMES, D // MODEL.num_heads, MODEL.rotary_base, torch.tensor([False, True, True]), draw)
    x_nD = torch.randn(plan.num_valid, D, generator=torch.Generator().manual_seed(seed))
    return x_nD.requires_grad_(), plan


def outcome(stack: Stack, mode: str, inputs: list[tuple[Tensor, StreamPlan]]) -> list[Tensor]:
    """Losses of the microbatches, and all gradients; forward passes first, as pipelining has them."""
    stack.set_mode(mode)
    leaves = [*(x_nD for x_nD, _ in inputs), *stack.parameters()]
    for leaf in leaves:
        leaf.grad = None
    for module in stack.modules():
        if isinstance(module, Router):
            module.begin_step(7)
    losses = [stack(x_nD, plan) for x_nD, plan in inputs]
    for loss in losses:
        loss.backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [*(loss.detach() for loss in losses), *gradients]


def assert_modes_agree(stack: Stack, inputs: list[tuple[Tensor, StreamPlan]]) -> None:
    plain, *others = (outcome(stack, mode, inputs) for mode in MODES)
    assert sum(bool(tensor.any()) for tensor in plain) > 10 or not inputs[0][1].num_valid
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("case", MOE_CASES)
def test_one_process(case: str, tmp_path: Path) -> None:
    inputs = [make_input(tmp_path, draw, seed=draw) for draw in range(2)]
    assert_modes_agree(Stack(**MOE_CASES[case]), inputs)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_with_small_experts_side_by_side(tmp_path: Path, two_threads: None) -> None:
    assert_modes_agree(Stack(num_experts=16, experts_per_token=2), [make_input(tmp_path)])


LAYOUTS = (
    ParallelConfig(expert_parallel_size=2),
    ParallelConfig(expert_parallel_size=1),
    ParallelConfig(tensor_parallel_size=2),
    ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
)


def modes_of_rank(root: Path) -> None:
    with process_group(timeout_minutes=0.5):
        for layout in LAYOUTS:
            groups = groups_of(layout, EXPERTS)
            for settings in MOE_CASES.values():
                for samples in (6, 0) if groups.data_rank else (6, 6):  # the second time rank 1 has no token
                    inputs = [make_input(root, draw, groups.data_rank, samples) for draw in range(2)]
                    assert_modes_agree(Stack(groups, **settings), inputs)
            destroy_groups()


def test_two_ranks_that_communicate_within_a_block(tmp_path: Path) -> None:
    run_ranks(2, modes_of_rank, tmp_path)


def test_nothing_in_a_block_draws_from_the_global_generator(tmp_path: Path) -> None:
    stack = Stack(**MOE_CASES["noise"])
    stack.set_mode("none")
    before = torch.get_rng_state()
    stack(*make_input(tmp_path)).backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_what_is_kept(backend: str, tmp_path: Path) -> None:
    stack, (x_nD, plan) = Stack(experts_per_token=2, expert_backend=backend), make_input(tmp_path)
    kept = {}
    for mode in MODES:
        stack.set_mode(mode)
        kept[mode] = saved_bytes(lambda: stack.run(x_nD, plan), stack.parameters())
    tokens, itemsize = plan.num_valid, 4
    first_products = (2 * tokens) * (2 * FF) * itemsize  # two experts a token, gate and up of each
    saving = kept["none"] - kept["experts"]
    if backend == "blocked":
        assert saving == pytest.approx(first_products, rel=0.1)  # a long expert's rows are padded
    else:
        assert saving > 2 * first_products  # and what lies between the two products
    assert kept["blocks"] == len(stack.blocks) * tokens * D * itemsize
    assert kept["blocks"] < kept["experts"] / 10
