"""The arithmetic of the layer's benchmark, and that all it times compute one function; no timing."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.layer import gpu, peers
from benchmarks.layer.roofline import Bound, Machine, layer_flops, row_bytes, weight_bytes
from benchmarks.layer.timing import TOLERANCE, Timing, distance, step, time_layers, wall_seconds
from benchmarks.layer.workload import BALANCED, EVEN, SKEWED, Point, assign, expert_counts, make_task

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
KINDS = (EVEN, BALANCED, SKEWED)
SMALL = Point(48, 4, hidden_size=16, expert_hidden_size=8)  # sizes that grouped_mm takes


def row(point: Point, distances: float | None = 0.0, **seconds: float) -> moe_layer.Row:
    timings = {name: Timing(taken, distances if name != "dense" else None) for name, taken in seconds.items()}
    return moe_layer.Row(point, timings, Bound(1.0, 0.1, 0.2, 0.3))


def test_operations_and_bytes_of_a_small_layer_by_hand() -> None:
    point = Point(tokens=2, experts=3, top_k=1, hidden_size=5, expert_hidden_size=7)
    # forward: 2 tokens x (5x7 twice, 7x5 once) x 2 operations = 420; the backward pass twice that.
    assert layer_flops(point) == 3 * 420
    # 3 experts x 105 weights x 4 bytes, three times.
    assert weight_bytes(point) == 3 * 1260
    # A = 2: 7 x 2 x 5 + 4 x 2 x 7 + 2 x 2 x 5 = 146 elements.
    assert row_bytes(point) == 146 * 4
    assert row_bytes(Point(2, 3, torch.bfloat16, top_k=1, hidden_size=5, expert_hidden_size=7)) == 146 * 2


def test_a_bound_adds_up_the_operations_of_each_expert_at_its_own_rate() -> None:
    point = Point(tokens=4, experts=2, top_k=1, hidden_size=1, expert_hidden_size=1)
    sizes = 1, 2  # inner size and columns of the first product
    rates = {
        ("matmul", torch.float32, 2048, 1): 100.0,
        ("product", torch.float32, (1, *sizes), 1): 10.0,
        ("product", torch.float32, (2, *sizes), 1): 50.0,
        ("bandwidth", 1): 4.0,
    }
    torch.set_num_threads(1)
    bound = Machine(CPU, rates=rates).bound(point, [1, 3])  # 3 rows take the rate of 2
    assert bound.arithmetic == pytest.approx(72 / 100)
    assert bound.small_products == pytest.approx(18 / 10 + 54 / 50 - 72 / 100)
    assert bound.weights == pytest.approx(3 * 2 * 3 * 4 / 4)
    assert bound.permutation == pytest.approx((7 * 4 + 4 * 4 + 2 * 4) * 4 / 4)


@pytest.mark.parametrize(
    ("terms", "roofline", "reason"),
    [
        ((4.0, 1.0, 2.0, 1.0), 4.0, "arithmetic"),
        ((4.0, 1.0, 5.0, 1.0), 6.0, "weight traffic"),
        ((1.0, 3.0, 0.5, 2.0), 2.5, "small products"),
        ((1.0, 0.0, 0.5, 2.0), 2.5, "permutation"),
    ],
)
def test_the_roofline_is_the_larger_of_arithmetic_and_traffic(
    terms: tuple[float, float, float, float], roofline: float, reason: str
) -> None:
    assert (Bound(*terms).roofline, Bound(*terms).reason) == (roofline, reason)


@pytest.mark.parametrize("experts", [8, 32, 128])
def test_loads_of_the_three_kinds_of_routing(experts: int) -> None:
    loads = {kind: expert_counts(Point(8192, experts, routing=kind)) for kind in KINDS}
    mean = 16384 // experts
    assert all(sum(counts) == 16384 for counts in loads.values())
    assert set(loads[EVEN]) == {mean}
    # A count is about Poisson: five standard deviations hold all 128 but for once in ten thousand.
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in loads[BALANCED])
    assert len(set(loads[BALANCED])) > 1
    assert max(loads[SKEWED]) == loads[SKEWED][0] == pytest.approx(min(8 * mean, 6144), abs=2)
    assert min(loads[SKEWED]) < mean / 2 + 1


@pytest.mark.parametrize(("counts", "top_k"), [([4, 4, 4, 4], 2), ([8, 5, 2, 1], 2), ([8, 8, 8], 3), ([7, 9, 0], 1)])
def test_assignments_have_the_counts_and_no_token_twice(counts: list[int], top_k: int) -> None:
    tokens = sum(counts) // top_k
    tokens_K = assign(counts, tokens, top_k, torch.Generator().manual_seed(3))
    assert tokens_K.reshape(-1).bincount(minlength=len(counts)).tolist() == counts
    assert all(len(set(chosen)) == top_k for chosen in tokens_K.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_choose_the_experts_meant_for_them(kind: str, dtype: torch.dtype) -> None:
    point = Point(256, 16, dtype, routing=kind, hidden_size=32, expert_hidden_size=8)
    task = make_task(point, CPU)
    logits = (task.x_TD @ task.router_ED.t()).float()  # in the type itself, as some peers compute it
    chosen = logits.topk(2).indices.reshape(-1)
    assert chosen.bincount(minlength=16).tolist() == task.counts_E


DTYPES = (torch.float32, torch.bfloat16)
SKEWED_SMALL = {dtype: Point(48, 4, dtype, routing=SKEWED, hidden_size=16, expert_hidden_size=8) for dtype in DTYPES}


def outcomes(name: str) -> list[list[torch.Tensor]]:
    """By type: output, and gradients of tokens, router and weights."""
    torch.set_num_threads(1)
    build = {"ours": peers.Ours, **peers.BASELINES, **{n: entry[0] for n, entry in peers.PEERS.items()}}[name]
    found = []
    for dtype in DTYPES:
        task = make_task(SKEWED_SMALL[dtype], CPU)
        layer, x_TD = build(task), task.x_TD.clone().requires_grad_()
        out_TD = step(layer, x_TD, task.grad_TD)
        assert x_TD.grad is not None
        found.append([t.detach().float() for t in (out_TD, x_TD.grad, *layer.gradients())])
    return found


def by_hand(dtype: torch.dtype) -> list[torch.Tensor]:
    """The same in fp64: every expert on every token, weighted by what the router gives it."""
    task = make_task(SKEWED_SMALL[dtype], CPU)
    leaves = [t.double().requires_grad_() for t in (task.x_TD, task.router_ED, task.up_EFD, task.down_EDF)]
    x, router, up, down = leaves
    logits = x @ router.t()
    kept = logits >= logits.topk(2).values[:, 1:]
    weights = logits.masked_fill(~kept, -math.inf).softmax(-1)
    gate, value = torch.einsum("td,efd->etf", x, up).chunk(2, dim=-1)
    y = torch.einsum("etf,edf,te->td", gate * gate.sigmoid() * value, down, weights)
    return [y.detach(), *torch.autograd.grad(y, leaves, task.grad_TD.double())]


@pytest.mark.parametrize("name", ["ours", *peers.BASELINES, *peers.PEERS])
def test_everything_timed_computes_the_function_by_hand(name: str) -> None:
    if name in peers.PEERS and (reason := peers.missing(name)):
        pytest.skip(reason)
    # In a fork: megatron-core's process group and DeepSpeed's start-up stay out of this process.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(outcomes, (name,))
    for dtype, tensors in zip(DTYPES, found, strict=True):
        for what, a, b in zip(("out", "x", "router", "up", "down"), tensors, by_hand(dtype), strict=True):
            assert distance(a, b) < TOLERANCE[dtype], (what, dtype)


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    reason = peers.missing("transformers")
    assert reason is not None and "transformers is not installed" in reason and "[bench]" in reason
    assert peers.missing("deepspeed") is None


def test_timings_know_who_computes_something_else() -> None:
    task = make_task(SMALL, CPU)
    doubled = peers.Ours(task)
    doubled.register_forward_hook(lambda module, args, out: 2 * out)
    layers = {"dense": peers.Dense(task), "ours": peers.Ours(task), "doubled": doubled}
    timings = time_layers(layers, task, 1, wall_seconds)
    assert timings["dense"].distance is None and timings["ours"].distance == 0
    assert timings["doubled"].distance == pytest.approx(1)  # |2 y - y| / |y|
    assert not timings["doubled"].agrees(torch.float32) and timings["ours"].agrees(torch.float32)
    assert all(parameter.grad is None for layer in layers.values() for parameter in layer.parameters())


def test_the_last_line_has_the_means_the_worst_and_the_cost_of_skew() -> None:
    skewed = Point(8192, 32, routing=SKEWED)
    rows = [
        row(Point(8192, 32), dense=8.0, ours=2.0, transformers=4.0, deepspeed=2.0),
        row(skewed, dense=2.0, ours=2.2, transformers=2.2, deepspeed=17.6),
    ]
    found = json.loads(json.dumps(moe_layer.summary(rows, Machine(CPU)), allow_nan=False))
    assert found["vs_dense"] == pytest.approx(math.sqrt(4 * 2 / 2.2), abs=1e-3)
    assert found["vs_transformers"] == pytest.approx(math.sqrt(2), abs=1e-3)
    assert found["vs_deepspeed"] == pytest.approx(math.sqrt(8), abs=1e-3)
    assert found["vs_megatron"] is None
    assert (found["worst_vs_peer"], found["skew_vs_balanced"], found["points"]) == (1.0, 1.1, 2)
    assert found["balanced"] == {"vs_dense": 4.0, "vs_transformers": 2.0, "vs_deepspeed": 1.0, "vs_megatron": None}
    assert {"device", "threads", "torch", "disagree"} <= found.keys()


def test_a_peer_that_disagrees_is_marked_and_counted_in_no_mean() -> None:
    wrong = row(Point(8192, 32), distances=0.5, dense=2.0, ours=1.0, transformers=9.0)
    found = moe_layer.summary([wrong], Machine(CPU))
    assert found["vs_transformers"] is None and found["worst_vs_peer"] is None
    assert found["disagree"] == ["T8192-E32-fp32-1t-balanced transformers"]
    assert "0.22!" in moe_layer.line(wrong, ["transformers"])


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    assert moe_layer.slope([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == 1.0
    assert moe_layer.slope([8, 64, 512], [5.0, 5.0, 5.0]) == 0.0


def test_the_point_of_a_gpu_has_a_share_for_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {("matmul", torch.float32, gpu.RATE_SIZE, torch.get_num_threads()): 1e12}
    found = gpu.gpu_point(Machine(CPU, rates=rates), 1, SMALL)
    assert {"share_ours", "share_grouped_mm", "share_loop", "share_dense", "vs_loop", "vs_grouped_mm"} <= found.keys()
    assert "grouped_mm" in capsys.readouterr().out


def test_it_runs_as_a_file_from_anywhere_and_refuses_points_that_are_not(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "moe_layer.py"), "--quick", "--points", "E9000"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "--points E9000 names no point" in ran.stderr
