"""The back ends of the experts against a loop in fp64 and against each other, forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe import dispatch
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.cpu import blocked as blocks
from mmmoe_pretrain.moe.cpu.blocked import blocked
from mmmoe_pretrain.moe.cpu.padding import pad_plan
from mmmoe_pretrain.moe.expert_math import ExpertStack
from mmmoe_pretrain.moe.experts import EXPERT_BACKENDS, choose_backend
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.plan import ExpertPlan, plan_of_slots, plan_on_device, zero_unused_
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.plain_experts import weighted_experts

D, FF = 8, 16  # rows of 16 bytes and more in bf16: grouped_mm takes them
# fp64 sums of tens of terms near 1 in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    """Leaves x [n, D], weights [n, K], up, down; slots [n, K], E meaning nowhere; and a target [n, D]."""

    x: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    slots: Tensor
    target: Tensor
    activation: str

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.weights, self.up, self.down

    def to(self, dtype: torch.dtype) -> Case:
        """The same values as leaves of another type; routing weights fp32 at least, as a router gives them."""
        x, up, down = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.up, self.down))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = self.weights.detach().to(wide).requires_grad_()
        return Case(x, weights, up, down, self.slots, self.target.to(dtype), self.activation)

    def plan(self) -> tuple[ExpertPlan, Tensor]:
        """The plan, and the routing weights in its order."""
        plan, order_A = plan_of_slots(self.slots, self.up.shape[0])
        return plan, self.weights.reshape(-1)[order_A]

    def stack(self, recompute: bool = False) -> ExpertStack:
        return ExpertStack(self.up, self.down, self.activation, recompute=recompute)

    def run(self, backend: str = "blocked", recompute: bool = False) -> Tensor:
        plan, weights_A = self.plan()
        return EXPERT_BACKENDS[backend](self.x, weights_A, plan, self.stack(recompute))

    def loop(self) -> Tensor:
        return weighted_experts(self.x, self.slots, self.weights, list(self.up), list(self.down), self.activation)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * self.target).sum(), self.leaves, retain_graph=True)


def make_case(
    slots: Tensor, num_experts: int, activation: str = "swiglu", dtype: torch.dtype = torch.float64, size: int = D
) -> Case:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = ACTIVATIONS[activation].width * FF
    n = slots.shape[0]
    weights = torch.rand(slots.shape, generator=generator, dtype=torch.float64)
    up, down = normal(num_experts, width, size) / size**0.5, normal(num_experts, size, FF) / FF**0.5
    return Case(normal(n, size), weights, up, down, slots, normal(n, size), activation).to(dtype)


def random_slots(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Unlike experts of each token."""
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(tokens + num_experts))
    return scores.topk(top_k).indices


def assert_equals_loop(case: Case, backend: str = "blocked", **tolerance: float) -> None:
    ours, loop = case.run(backend), case.loop()
    torch.testing.assert_close(ours, loop, **tolerance)
    for mine, theirs in zip(case.gradients(ours), case.gradients(loop), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


ROUTINGS = {
    **{f"E {e}, K {k}, n {n}": (random_slots(n, e, k), e)
       for e, k, n in [(4, 2, 9), (8, 8, 5), (16, 2, 1), (32, 2, 40), (128, 8, 30), (128, 1, 3), (4, 2, 0)]},
    "all tokens to one expert": (torch.full((40, 1), 2), 4),
    "some assignments nowhere": (torch.tensor([[0, 4], [4, 4], [3, 0], [4, 1]]), 4),
    "all assignments nowhere": (torch.full((5, 2), 4), 4),
    "the same expert twice": (torch.tensor([[1, 1], [0, 0], [1, 0]]), 4),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_both_back_ends_equal_a_loop_over_experts(routing: str, activation: str) -> None:
    slots, num_experts = ROUTINGS[routing]
    case = make_case(slots, num_experts, activation)
    assert_equals_loop(case, **EXACT)
    single = case.to(torch.float32)
    plan, _ = single.plan()
    if plan.num_assignments:
        names = {name: choose_backend(name, single.x, plan, single.stack()) for name in ("auto", *EXPERT_BACKENDS)}
        assert names == {"auto": blocked, **EXPERT_BACKENDS}  # on a CPU
        # Chains of sums of up to 40 terms near 1, each a unit or two of 6e-8 off.
        assert_equals_loop(single, "grouped_mm", rtol=1e-5, atol=1e-5)


class _Unwritten(torch.autograd.Function):
    """Rows from ``end`` on become NaN in the result, in the gradient, or in both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int, forward: bool) -> Tensor:
        ctx.end, ctx.forward = end, forward
        return _with_nan(x, end) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad if ctx.forward else _with_nan(grad, ctx.end)), None, None


def _with_nan(x: Tensor, end: int) -> Tensor:
    out = x.clone()
    out[end:] = torch.nan
    return out


@pytest.fixture
def rows_past_the_last_end_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU leaves unwritten may be anything; in ``grouped_mm``'s result and in the gradient of its input."""
    plain = F.grouped_mm

    def grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        if weight.ndim == 2:  # a gradient of weights, which has no such rows
            return plain(x, weight, offs=offs)
        end = int(offs[-1])
        return _Unwritten.apply(plain(_Unwritten.apply(x, end, False), weight, offs=offs), end, True)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)


@pytest.mark.usefixtures("rows_past_the_last_end_are_nan")
@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize("routing", [name for name, (slots, _) in ROUTINGS.items() if len(slots)])
def test_counts_that_stay_on_the_device_change_nothing(routing: str, backend: str) -> None:
    slots, num_experts = ROUTINGS[routing]
    case = make_case(slots, num_experts, dtype=torch.float32)
    for dropless in (False, True) if (slots < num_experts).all() else (False,):
        plan, order_A = plan_on_device(slots, num_experts, dropless)
        assert plan.num_assignments == slots.numel()
        assert list(plan.counts) == [int((slots == e).sum()) for e in range(num_experts)]
        weights_A = zero_unused_(case.weights.reshape(-1)[order_A], plan)
        out, loop = EXPERT_BACKENDS[backend](case.x, weights_A, plan, case.stack()), case.loop()
        for ours, theirs in zip((out, *case.gradients(out)), (loop, *case.gradients(loop)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # as above


DROPS: dict[str, dict[str, Any]] = {
    "capacity": {"capacity_factor": 0.5, "expert_biases": True},
    "capacity, weight on input": {"capacity_factor": 0.5, "router_weight_on_input": True},
    "capacity, weight on input, biases": {
        "capacity_factor": 0.5,
        "router_weight_on_input": True,
        "expert_biases": True,
    },
    "null and identity experts": {"null_experts": 2, "identity_experts": 1, "experts_per_token": 3},
    "dropless": {"expert_biases": True},
}


@pytest.mark.usefixtures("rows_past_the_last_end_are_nan")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("drops", DROPS)
def test_a_layer_without_counts_on_the_host_gives_the_same_gradients(
    drops: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the layer plans on the device; every parameter, biases included."""
    config = MoEConfig(num_experts=4, expert_hidden_size=16, expert_backend="grouped_mm", **DROPS[drops])
    torch.manual_seed(5)
    layer, x = MoELayer(config, D, 0, SINGLE), torch.randn(40, D)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.experts.recompute = recompute
    tokens = TokenInfo.of_modalities(torch.zeros(40, dtype=torch.int64))

    def gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf, tokens)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])]

    expected = gradients()
    used: list[bool] = []

    def on_device(slots_nK: Tensor, num_slots: int) -> tuple[ExpertPlan, Tensor]:
        plan, order_A = plan_on_device(slots_nK, num_slots, config.dropless)
        used.append(plan.unused_A is not None and bool(plan.unused_A.any()))
        return plan, order_A

    monkeypatch.setattr(dispatch, "plan_of_slots", on_device)
    found = gradients()
    assert used == [drops != "dropless"]  # the layer drops what it is meant to
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_bf16_is_off_by_its_own_rounding_alone(backend: str, activation: str) -> None:
    case = make_case(random_slots(60, 8, 2), 8, activation, torch.bfloat16)
    exact = case.to(torch.float64)
    out, loop = case.run(backend), exact.loop()
    # Roundings one after another on the way back: weight, up, activation, h, y, gradient, sum over K, and
    # the product itself. Each is at most eps / 2 of its value and they are independent: about
    # sqrt(8) / 2 eps in the norm; twice that is the bound.
    bound = 2 * 8**0.5 / 2 * torch.finfo(torch.bfloat16).eps
    for ours, theirs in zip((out, *case.gradients(out)), (loop, *exact.gradients(loop)), strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < bound


@pytest.mark.parametrize(
    "why,case",
    [
        ("no fp64", make_case(random_slots(6, 4, 2), 4)),
        ("rows not a multiple of 16 bytes", make_case(random_slots(6, 4, 2), 4, dtype=torch.float32, size=5)),
        ("no rows at all", make_case(torch.full((6, 2), 4), 4, dtype=torch.float32)),
        ("no fp16 on a CPU", make_case(random_slots(6, 4, 2), 4, dtype=torch.float16)),
    ],
)
def test_blocks_step_in_where_grouped_mm_has_a_hole(why: str, case: Case) -> None:
    plan, weights_A = case.plan()
    backend = choose_backend("grouped_mm", case.x, plan, case.stack())
    assert backend is blocked, why
    out = backend(case.x, weights_A, plan, case.stack())
    # fp16 rounds h and y to 11 bits; values are near 1.
    torch.testing.assert_close(out.double(), case.to(torch.float64).loop(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_expert_with_more_rows_than_a_block_is_computed_in_pieces(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)  # the least block: 256 rows
    slots = torch.cat([torch.full((700, 1), 1), torch.full((257, 1), 3), torch.full((256, 1), 0)])
    case = make_case(slots, 4, activation)
    plan, weights = case.plan()[0], torch.ones(sum(case.plan()[0].counts))
    layout = pad_plan(plan, weights, blocks._most_rows(case.up), pad=False)
    lengths = [(piece.expert, piece.count) for piece in layout.pieces]
    assert lengths == [(0, 256), (1, 256), (1, 256), (1, 188), (3, 256), (3, 1)]
    assert_equals_loop(case, **EXACT)


def test_pieces_of_half_precision_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    rows, piece = 5 * 256, 256
    # One expert; every row is 16 in its first column, so is its first GELU (16 Phi(16) = 16): h = 16.
    x = torch.zeros(rows, D, dtype=torch.bfloat16)
    x[:, 0] = 16
    up, down = torch.zeros(1, FF, D, dtype=torch.bfloat16), torch.zeros(1, D, FF, dtype=torch.bfloat16)
    up[0, 0, 0] = down[0, 0, 0] = 1
    target = torch.zeros(rows, D, dtype=torch.bfloat16)
    target[:piece, 0], target[piece:, 0] = 1, 1 / 256
    case = Case(x, torch.ones(rows, 1), up, down, torch.zeros(rows, 1, dtype=torch.int64), target, "gelu")
    case = case.to(torch.bfloat16)
    _, _, grad_up, grad_down = case.gradients(case.run())
    # The first piece gives 16 * 256 = 4096, each other 16; steps of bf16 there are 32, so that adding
    # piece by piece in bf16 would stay at 4096. 4096 + 4 * 16 = 4160 is a bf16 number.
    assert grad_down[0, 0, 0].item() == 4160
    assert grad_up[0, 0, 0].item() == 4160


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_two_threads_equal_one(activation: str, two_threads: None) -> None:
    slots = torch.cat([random_slots(60, 16, 2), torch.full((200, 2), 5)])  # expert 5 takes all threads
    case = make_case(slots, 16, activation)
    assert_equals_loop(case, **EXACT)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("products", ["torch", "onednn"])
def test_every_product_is_by_the_library_of_the_stack_and_equals_the_loop(
    products: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, rows_for_all = [], []
    for name in ("matmul", "matmul_into"):
        plain = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *of, plain=plain: used.append(of[-1]) or plain(*of))
    spread = blocks.run_side_by_side
    monkeypatch.setattr(blocks, "run_side_by_side", lambda *of: rows_for_all.append(of[-1]) or spread(*of))
    case = make_case(random_slots(40, 4, 2), 4, dtype=torch.float32)
    plan, weights_A = case.plan()
    stack = replace(case.stack(recompute), cpu_config=CpuConfig(products=products, rows_for_all_threads=5))
    out, loop = blocked(case.x, weights_A, plan, stack), case.loop()
    close = {"rtol": 1e-5, "atol": 1e-5}  # fp32, as above
    torch.testing.assert_close(out, loop, **close)
    torch.testing.assert_close(case.gradients(out), case.gradients(loop), **close)
    # Of each of 4 experts: two products forward; backward one for h, two for weights, one for x; again the first.
    assert used == [products] * (4 * (6 + recompute))
    assert rows_for_all == [5, 5]


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_rows_and_gradients_that_are_expanded_or_transposed_are_read_right(backend: str) -> None:
    case = make_case(random_slots(12, 4, 2), 4, dtype=torch.float32)
    plan, weights_A = case.plan()
    close = {"rtol": 1e-5, "atol": 1e-5}  # fp32, as above
    ours = EXPERT_BACKENDS[backend](case.x.t().contiguous().t(), weights_A, plan, case.stack())
    torch.testing.assert_close(ours, case.loop(), **close)
    for target in (torch.ones(()).expand(12, D), case.target.t().contiguous().t()):
        ours = torch.autograd.grad(case.run(backend), case.leaves, target)
        torch.testing.assert_close(ours, torch.autograd.grad(case.loop(), case.leaves, target), **close)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("frozen", [("x",), ("up", "down"), ("x", "weights"), ("weights", "up", "down"), ("down",)])
def test_what_needs_no_gradient_gets_none_and_the_rest_the_same(
    frozen: tuple[str, ...], backend: str, recompute: bool
) -> None:
    case = make_case(random_slots(12, 4, 2), 4, dtype=torch.float32)
    expected = dict(zip(("x", "weights", "up", "down"), case.gradients(case.loop()), strict=True))
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    case.run(backend, recompute).mul(case.target).sum().backward()
    for name, gradient in expected.items():
        if name in frozen:
            assert getattr(case, name).grad is None
        else:
            torch.testing.assert_close(getattr(case, name).grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes_give_the_same_output(backend: str, mode: type, two_threads: None) -> None:
    case = make_case(random_slots(40, 16, 2), 16, dtype=torch.float32)  # 16 small experts: both threads work
    with mode():
        out = case.run(backend)
    assert not out.requires_grad
    torch.testing.assert_close(out, case.run(backend).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_recomputed_activations_give_the_same_bits(
    backend: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)  # pieces of 256 rows
    slots = torch.cat([random_slots(40, 4, 2), torch.full((300, 2), 1), torch.full((3, 2), 4)])
    case = make_case(slots, 4, activation, torch.float32)
    before = [leaf.detach().clone() for leaf in case.leaves]
    plain, again = case.run(backend), case.run(backend, recompute=True)
    assert torch.equal(plain, again)
    first, second = (case.gradients(again) for _ in range(2))  # a graph that is kept serves twice
    for expected, *found in zip(case.gradients(plain), first, second, strict=True):
        assert all(torch.equal(gradient, expected) for gradient in found)
    assert all(torch.equal(a, b) for a, b in zip(before, case.leaves, strict=True))  # nothing wrote to the inputs


BAD = {
    "NaN": (math.nan, torch.float32),
    "infinite": (math.inf, torch.float32),
    "too large for fp16 in expert 1": (300.0, torch.float16),
    "too large for fp32 in expert 1": (1e30, torch.float32),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_reaches_no_expert_that_it_does_not_visit(bad: str, backend: str, recompute: bool) -> None:
    """Row 0 visits expert 0. Expert 1 has 45 rows, which ``blocked`` pads to 48."""
    value, dtype = BAD[bad]
    if dtype == torch.float16 and backend == "grouped_mm":
        pytest.skip("no grouped products in fp16 on a CPU")
    case = make_case(torch.tensor([[0]] + [[1]] * 45 + [[2]] * 33), 3, dtype=dtype)
    without = Case(case.x[1:], case.weights[1:], case.up, case.down, case.slots[1:], case.target[1:], "swiglu")
    expected = without.gradients(without.run(backend, recompute))

    def gradients_of_visited(row: float) -> tuple[Tensor, Tensor]:
        case.x.data[0] = row
        grad_x, grad_weights, grad_up, grad_down = case.gradients(case.run(backend, recompute))
        for ours, theirs in zip((grad_x, grad_weights), expected[:2], strict=True):
            assert torch.equal(ours[1:], theirs)
        for ours, theirs in zip((grad_up, grad_down), expected[2:], strict=True):
            assert torch.equal(ours[1:], theirs[1:]) and theirs[1:].any()
        return grad_up[0], grad_down[0]

    assert all(own.isfinite().all() and own.any() for own in gradients_of_visited(0.5))
    case.up.data[0] = 0  # expert 0 itself overflows nowhere
    assert not (torch.full((D,), value, dtype=dtype) @ case.up.data[1].t()).square().isfinite().all()
    gradients_of_visited(value)
