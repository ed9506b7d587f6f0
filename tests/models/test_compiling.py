"""Compiled blocks compute the same under the same names, with few graphs for any number of tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.models.compiling import compile_blocks
from tests.models.stack import Stack, make_input, outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as the megatron engine leaves it on a CPU
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def assert_same_when_compiled(root: Path, backend: str) -> None:
    stack, inputs = Stack(), [make_input(root, samples=samples) for samples in (2, 1, 6, 0)]  # 0: no token
    names = list(stack.state_dict())
    plain = outcome(stack, "none", inputs)
    compile_blocks(stack, CPU, backend)
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert list(stack.state_dict()) == names
    for recompute in ("none", "blocks"):
        for ours, expected in zip(outcome(stack, recompute, inputs), plain, strict=True):
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
        compile_blocks(Stack(), CPU)
