"""Blocks cut over tensor ranks, with and without sequence parallelism and expert parallelism, against
one process: output, gradient of the input, and every parameter's gradient, part by part. Then a whole model.

All cases of a world size run in one process group. Data-parallel ranks have unlike numbers of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.config import ModelConfig, MoEConfig, ParallelConfig
from mmmoe_pretrain.config.moe import ExpertGroupConfig, RoutingLossConfig
from mmmoe_pretrain.models.attend import AttentionPlan
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.block import Block, RMSNorm
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.losses import routing_losses
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.placement import part_of, placements
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.parallel.tensor import enter_trunk, leave_trunk
from tests.distributed import groups_of, run_ranks
from tests.moe.routing_inputs import NAMES
from tests.support import random_batch, tiny_config

MODEL = ModelConfig(hidden_size=16, num_layers=2, num_heads=4, ffn_hidden_size=24)
UNLIKE = (
    ExpertGroupConfig(modalities=("image",), num_experts=2, expert_hidden_size=12),
    ExpertGroupConfig(num_experts=4, expert_hidden_size=6),
)
LOSSES = RoutingLossConfig(local_entropy=0.1, balance=0.1, z=0.1)
SPARSE = MoEConfig(num_experts=4, expert_hidden_size=8, losses=LOSSES)
MOE_CASES = {
    "swiglu, shared": {"shared_expert_hidden_size": 6},
    "gelu": {"activation": "gelu", "experts_per_token": 1},
    "gelu, shared, identity and null": {
        "activation": "gelu",
        "shared_expert_hidden_size": 6,
        "identity_experts": 2,
        "null_experts": 1,
        "experts_per_token": 4,
    },
    "groups of unlike size": {"num_experts": 6, "expert_groups": UNLIKE, "identity_experts": 1},
    "capacity, chunks": {"capacity_factor": 0.8, "dispatch_chunks": 2},
    "attention among experts": {
        "expert_attention_size": 4,
        "shared_expert_hidden_size": 6,
        "identity_experts": 1,
        "experts_per_token": 3,
    },
    "task-conditioned, sigmoid": {"task_conditioned": True, "router": "sigmoid_top_k"},
}
SEGMENTS = ((4, 3), (), (1,), (2, 2, 5))  # lengths of the segments; 7, 0, 1 and 9 tokens


@dataclass(frozen=True)
class Case:
    """``index``: the block, dense if even. ``segments``: of each data-parallel rank."""

    name: str
    index: int
    moe: MoEConfig
    segments: tuple[tuple[int, ...], ...]
    bf16: bool = False
    kv_heads: int = MODEL.num_heads


def cases() -> list[Case]:
    made = [Case("dense", 0, SPARSE, (segments, SEGMENTS[i - 1])) for i, segments in enumerate(SEGMENTS)]
    for name, override in MOE_CASES.items():
        moe = MoEConfig.model_validate({**SPARSE.model_dump(), **override})
        made += [Case(name, 1, moe, (segments, SEGMENTS[i - 1])) for i, segments in enumerate(SEGMENTS)]
    made += [replace(case, name="grouped queries", kv_heads=2) for case in made[:4]]
    return [*made, *(replace(case, name=f"{case.name}, bf16", bf16=True) for case in (made[0], made[4], made[12]))]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(segments: tuple[int, ...]) -> StreamPlan:
    """Causal blocks; angles of no particular meaning."""
    num_tokens = sum(segments)
    angle_nh = draw(2, num_tokens, MODEL.hidden_size // MODEL.num_heads // 2)
    tokens = TokenInfo.of_modalities(torch.arange(num_tokens) % 3, NAMES)
    plan = AttentionPlan(AttentionBlocks(segments, (0,) * len(segments)), torch.device("cpu"))
    return StreamPlan(tokens, angle_nh.cos(), angle_nh.sin(), plan)


class OneBlock(nn.Module):
    """A trunk of one block."""

    def __init__(self, case: Case, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        model = MODEL.model_copy(update={"num_kv_heads": case.kv_heads})
        self.block = Block(model, case.moe, case.index, groups, NAMES)
        self.norm = RMSNorm(MODEL.hidden_size, groups)
        init_parameters(self, seed=5, num_layers=1)
        with torch.no_grad():  # so that a norm which is mixed up shows
            for seed, norm in enumerate((self.norm, self.block.attention_norm, self.block.ffn_norm)):
                norm.weight.add_(0.3 * draw(seed, MODEL.hidden_size))
            for name, parameter in self.named_parameters():
                if name.endswith("expert_attention.out.weight"):  # 0 at the start
                    parameter.copy_(draw(4, *parameter.shape))
        if case.bf16:
            for name, parameter in self.named_parameters():
                if parameter.ndim >= 2 and ".router." not in name:
                    parameter.data = parameter.data.bfloat16()

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, Tensor]:
        """Output and auxiliary loss."""
        y, stats = self.block(enter_trunk(x_nD, self.groups), plan)
        y = leave_trunk(self.norm(y), plan.num_valid, self.groups)
        auxiliary = routing_losses((stats,), LOSSES, None) if stats is not None else {}
        return y, torch.stack([torch.zeros(()), *auxiliary.values()]).sum()


def run(case: Case, groups: Groups, data_rank: int) -> tuple[OneBlock, dict[str, Tensor]]:
    plan = stream(case.segments[data_rank])
    model = OneBlock(case, groups)
    x = draw(data_rank, plan.num_valid, MODEL.hidden_size)
    x = (x.bfloat16() if case.bf16 else x).requires_grad_()
    y, auxiliary = model(x, plan)
    ((y.float() * draw(7, *y.shape)).sum() + auxiliary).backward()
    assert x.grad is not None
    return model, {"output": y.detach(), "auxiliary loss": auxiliary.detach(), "gradient of x": x.grad}


# Relative to the largest value. fp32: sums of at most 24 terms in another order, through four products in a row and
# back, and norms that magnify; 22 * 2^-24 was seen. bf16: forward and back some 16 roundings of 2^-9 of each value,
# which differ from those of the reference; 7 * 2^-9 was seen.
BOUNDS = {torch.float32: 64 * 2**-24, torch.bfloat16: 16 * 2**-9}


def check_close(found: Tensor, expected: Tensor, what: str, bound: float) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    assert found.dtype == expected.dtype, what
    if expected.numel():
        worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-4)
        assert worst < bound, f"{what}: {worst:.1e} of the largest value, bound {bound:.1e}"


def check_parameters(model: nn.Module, reference: nn.Module, groups: Groups, what: str, bound: float) -> None:
    """Each is this rank's part of the reference's, and so is its gradient once an engine has joined the ranks'."""
    for name, placement in placements(model).items():
        parameter, whole = model.get_parameter(name), reference.get_parameter(name)
        own, gradient = parameter.grad, whole.grad
        assert own is not None and gradient is not None, f"{what}: {name}"
        assert torch.equal(parameter.detach(), part_of(whole.detach(), placement)), f"{what}: value of {name}"
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(own, group=groups.tensor)
        if ".experts." in name:
            dist.all_reduce(gradient, group=groups.expert)
        check_close(own, part_of(gradient, placement), f"{what}: gradient of {name}", bound)


def check(case: Case, groups: Groups) -> None:
    shown = f"{case.name}, segments {case.segments[groups.data_rank]}, {groups.expert_size} expert ranks"
    what = f"{shown}, sequence parallel {groups.sequence_parallel}"
    bound = BOUNDS[torch.bfloat16 if case.bf16 else torch.float32]
    model, found = run(case, groups, groups.data_rank)
    reference, expected = run(case, SINGLE, groups.data_rank)
    for name, value in expected.items():
        check_close(found[name], value, f"{what}: {name}", bound)
    check_parameters(model, reference, groups, what, bound)
    for name, parameter in model.named_parameters():
        assert getattr(parameter, "tensor_model_parallel", False) == _is_cut(name), f"{what}: mark of {name}"


def check_model(groups: Groups, modalities: list[str]) -> None:
    """Embedders, trunk, heads and objectives; a batch without text reaches neither table nor language head.
    Contrast divides by a temperature of 0.07, which magnifies roundings 14 times: see the bound."""
    config = tiny_config(Path("unused"))
    batch = random_batch(config, modalities)
    models = [PretrainingModel(config, layout) for layout in (groups, SINGLE)]
    losses = [model(batch)[0] for model in models]
    torch.autograd.backward(losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    check_parameters(*models, groups, str(modalities), 14 * BOUNDS[torch.float32])


def _is_cut(name: str) -> bool:
    return not ("norm" in name or ".router." in name or ".expert_attention." in name)


def all_cases(world_size: int) -> Any:
    with process_group(timeout_minutes=0.5):
        for sequence_parallel in (False, True):
            settings = ParallelConfig(
                tensor_parallel_size=2, sequence_parallel=sequence_parallel, expert_parallel_size=world_size // 2
            )
            groups = groups_of(settings, 4)
            for case in cases()[:: world_size // 2]:  # of four ranks every second one: 7 and 9 tokens, 1 and 0
                check(case, groups)
            if world_size == 2:
                check_model(groups, ["iat", "it", "a"])
                check_model(groups, ["i", "a"])
            destroy_groups()


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_ranks_compute_what_one_process_computes(world_size: int) -> None:
    """Two tensor ranks, and as many expert ranks as that leaves."""
    run_ranks(world_size, all_cases, world_size)
