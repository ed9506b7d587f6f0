"""The grouped experts' backward pass by hand against the same products under autograd, and what it keeps."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain import kernels
from mmmoe_pretrain.moe.activation import weighted
from mmmoe_pretrain.moe.expert_math import ExpertStack, grouped_mm
from mmmoe_pretrain.moe.plan import ExpertPlan, plan_of_slots, sum_rows, take_rows
from mmmoe_pretrain.plan.live import LiveTensors

D, WIDTH, EXPERTS, TOKENS, TOP_K = 16, 32, 5, 40, 2
Function = Callable[[Tensor, Tensor, ExpertPlan, ExpertStack], Tensor]


def by_autograd(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """Every tensor on the way is kept."""
    ends = torch.tensor(list(itertools.accumulate(plan.counts)), dtype=torch.int32)
    up_AF = F.grouped_mm(take_rows(x_mD, plan), stack.up_EFD.transpose(1, 2), offs=ends)
    if stack.up_bias_EF is not None:
        up_AF = up_AF + stack.up_bias_EF.to(up_AF.dtype)[plan.experts_A]
    y_AD = F.grouped_mm(weighted(stack.activation, up_AF, weights_A), stack.down_EDF.transpose(1, 2), offs=ends)
    return sum_rows(y_AD, plan)


def problem(
    activation: str, dtype: torch.dtype, has_bias: bool = False
) -> tuple[list[Tensor], ExpertPlan, ExpertStack]:
    """Leaves (rows, weights, up, down, biases), and a plan where expert 3 is idle and some assignments go nowhere."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    slots = torch.randint(0, EXPERTS + 1, (TOKENS, TOP_K), generator=generator)
    plan, _ = plan_of_slots(torch.where(slots == 3, EXPERTS, slots), EXPERTS)
    width = WIDTH * (1 if activation == "gelu" else 2)
    half = [draw(TOKENS, D), draw(EXPERTS, width, D) / D**0.5, draw(EXPERTS, D, WIDTH) / WIDTH**0.5]
    x, up, down = (t.to(dtype).requires_grad_() for t in half)
    weights, biases = draw(plan.num_assignments).requires_grad_(), draw(EXPERTS, width).requires_grad_()
    leaves = [x, weights, up, down, *([biases] if has_bias else [])]
    return leaves, plan, ExpertStack(up, down, activation, biases if has_bias else None)


def outputs_and_gradients(
    function: Function, leaves: Sequence[Tensor], plan: ExpertPlan, stack: ExpertStack
) -> list[Tensor]:
    out = function(leaves[0], leaves[1], plan, stack)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_autograd(
    dtype: torch.dtype, activation: str, has_bias: bool, recompute: bool
) -> None:
    leaves, plan, stack = problem(activation, dtype, has_bias)
    assert plan.counts[3] == 0 < min(plan.counts[:3])
    expected = outputs_and_gradients(by_autograd, leaves, plan, stack)
    found = outputs_and_gradients(grouped_mm, leaves, plan, replace(stack, recompute=recompute))
    assert torch.equal(found[0], expected[0])  # the same operations
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == theirs.dtype
        # fp32: sums of tens of terms in another order. bf16: autograd also rounds the terms of the weights' gradients
        # (8 bits), and adds the biases' gradients one by one in bf16: some tens of roundings, in all up to 2%.
        bound = (2e-6 if dtype is torch.float32 else 2e-2) * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=bound)


def test_recomputed_blocks_and_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under activation checkpointing; and with the kernels, as on a GPU."""
    leaves, plan, stack = problem("swiglu", torch.float32)
    expected = outputs_and_gradients(grouped_mm, leaves, plan, stack)

    def again(*given: Tensor | ExpertPlan | ExpertStack) -> Tensor:
        return checkpoint(grouped_mm, *given, use_reentrant=False)

    assert all(map(torch.equal, outputs_and_gradients(again, leaves, plan, stack), expected))
    pytest.importorskip("triton", reason="triton is not installed; pip install triton")
    importlib.import_module("mmmoe_pretrain.kernels.swiglu")
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    for mine, theirs in zip(outputs_and_gradients(grouped_mm, leaves, plan, stack), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())  # fp32, as above


def kept_bytes(function: Function, leaves: Sequence[Tensor], plan: ExpertPlan, stack: ExpertStack) -> int:
    """From forward to backward pass, beside the parameters; each memory once."""
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves[2:]}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = function(leaves[0], leaves[1], plan, stack)
        assert out.requires_grad
        return sum(kept.values())


def test_nothing_of_the_first_products_width_is_kept_twice() -> None:
    """Of an assignment the first product (2 F) instead of that, its input (D), h before and after the weight (F each)
    and what SiLU makes (F); recomputed, nothing of these. The rows (D), the weights and the ends are kept."""
    # 2 bytes a number, but weights and ends 4.
    leaves, plan, stack = problem("swiglu", torch.bfloat16)
    A, rows = plan.num_assignments, 2 * TOKENS * D + 4 * plan.num_assignments + 4 * EXPERTS
    assert kept_bytes(grouped_mm, leaves, plan, stack) == rows + 2 * A * 2 * WIDTH
    assert kept_bytes(grouped_mm, leaves, plan, replace(stack, recompute=True)) == rows
    with torch.no_grad():
        assert not grouped_mm(leaves[0], leaves[1], plan, stack).requires_grad
    rounded_weights = 2 * A
    expected = 4 * EXPERTS + rounded_weights + 2 * A * (D + 5 * WIDTH)
    assert kept_bytes(by_autograd, leaves, plan, stack) == expected


def held_at_each_product(retain_graph: bool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what forward and backward pass have made, as each product of the backward pass begins."""
    leaves, plan, stack = problem("swiglu", torch.bfloat16)
    live, held, plain = LiveTensors(), [], F.grouped_mm
    with live, monkeypatch.context() as patched:
        out = grouped_mm(leaves[0], leaves[1], plan, stack)
        patched.setattr(F, "grouped_mm", lambda *of, **by: held.append(live.live) or plain(*of, **by))
        torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=retain_graph)
    return held


def test_the_first_product_is_freed_before_the_gradients_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the graph is kept for a second backward pass."""
    once, again = (held_at_each_product(retain_graph, monkeypatch) for retain_graph in (False, True))
    assignments = problem("swiglu", torch.bfloat16)[1].num_assignments
    first_product = 2 * assignments * 2 * WIDTH
    assert [b - a for a, b in zip(once, again, strict=True)] == [0, first_product, first_product, first_product]


@pytest.mark.parametrize(
    ("frozen", "products"),
    [((), 4), (("x",), 3), (("up",), 3), (("down",), 3), (("up", "down"), 2), (("x", "up", "down"), 1),
     (("x", "weights", "up"), 1)],
)  # fmt: skip
def test_the_backward_pass_makes_no_product_that_nobody_needs(
    frozen: tuple[str, ...], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four: the gradients of h, of the rows and of both weights."""
    leaves, plan, stack = problem("swiglu", torch.float32)
    for name, leaf in zip(("x", "weights", "up", "down"), leaves, strict=True):
        leaf.requires_grad_(name not in frozen)
    out = grouped_mm(leaves[0], leaves[1], plan, stack)
    calls, plain = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *given, **options: calls.append(1) or plain(*given, **options))
    out.sum().backward()
    assert len(calls) == products
