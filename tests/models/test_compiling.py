"""Compiled blocks compute the same under the same names, with few graphs for any number of tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.models.attention import StreamPlan, plan_stream
from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.models.compiling import compile_blocks
from mmmoe_pretrain.models.recompute import run_block
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.routing_inputs import NAMES
from tests.support import random_batch, tiny_config

CPU = torch.device("cpu")
MODEL = ModelConfig(hidden_size=16, num_layers=3, num_heads=2, ffn_hidden_size=24)
BATCHES = (["iat", "t"], ["a"], ["iat"] * 5, [])  # of different numbers of tokens; the last has none


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as the megatron engine leaves it on a CPU
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def make_blocks() -> nn.ModuleList:
    moe = MoEConfig(num_experts=4, expert_hidden_size=8, every=2)
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(MODEL, moe, i, SINGLE, NAMES) for i in range(MODEL.num_layers))
    for parameter in blocks.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return blocks


def make_inputs(root: Path) -> list[tuple[Tensor, StreamPlan]]:
    rotary = torch.tensor([False, True, True])
    plans = [
        plan_stream(random_batch(tiny_config(root), has), NAMES, 8, MODEL.rotary_base, rotary) for has in BATCHES
    ]
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(plan.num_valid, 16, generator=generator).requires_grad_(), plan) for plan in plans]


def outcome(blocks: nn.ModuleList, inputs: list[tuple[Tensor, StreamPlan]], recompute: bool = False) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters."""
    leaves, outputs = [*(x_nD for x_nD, _ in inputs), *blocks.parameters()], []
    for x_nD, plan in inputs:
        for block in blocks:
            x_nD, _ = run_block(block, x_nD, plan, recompute)
        outputs.append(x_nD)
    return [
        *(out.detach() for out in outputs),
        *torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves),
    ]


def assert_same_when_compiled(root: Path, backend: str) -> None:
    blocks, inputs = make_blocks(), make_inputs(root)
    names = list(blocks.state_dict())
    plain = outcome(blocks, inputs)
    compile_blocks(blocks, CPU, backend)
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert list(blocks.state_dict()) == names
    for recompute in (False, True):
        for ours, expected in zip(outcome(blocks, inputs, recompute), plain, strict=True):
            # Some thirty fp32 operations in a row, fused in another order, forward and backward: each a
            # rounding of 6e-8 of the norm, and a few times that where a normalisation divides by little.
            assert ours.shape == expected.shape
            assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_compiled_blocks_compute_the_same_by_few_graphs(tmp_path: Path) -> None:
    assert_same_when_compiled(tmp_path, "aot_eager")
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Three functions, each for some tokens and for none.
    assert 3 <= counters["stats"]["unique_graphs"] <= 6


@pytest.mark.slow
def test_the_default_compiler_computes_the_same(tmp_path: Path) -> None:
    assert_same_when_compiled(tmp_path, "inductor")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3


def test_without_a_cpp_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler.*install g\+\+.*train.compile none"):
        compile_blocks(make_blocks(), CPU)
