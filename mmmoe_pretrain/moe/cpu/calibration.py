"""Measures what ``train.cpu`` leaves open, on this CPU and for the sizes of a config: which library multiplies in
fp32, and up to which number of rows experts run side by side.

Plain torch, one expert after another, is the default: another way must be faster by ``MARGIN``. Takes tens of
milliseconds (``BUDGET``), so sizes are bounded, and between two ways that are about equal the choice is chance: a run
measures once and saves the result (``train/cpu.py``). Sizes of pieces are not measured, since they follow
from memory, not from the library: see ``BLOCK_BYTES`` (``blocked.py``) and ``CHUNK_BYTES`` (``activation.py``).

Shapes: n rows, D and F the inner and outer size of a product.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from mmmoe_pretrain.config.moe import ExpertGroupConfig, MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.cpu.blocked import blocked
from mmmoe_pretrain.moe.cpu.matmul import HAS_ONEDNN, matmul, matmul_into
from mmmoe_pretrain.moe.expert_math import ExpertStack
from mmmoe_pretrain.moe.plan import plan_of_slots

MARGIN = 0.05  # by which another way must be faster than plain torch: less is noise
SPELLS = 3  # of each way, in turn; the fastest counts, since all that disturbs only slows down
BUDGET = 0.04  # seconds, past which no other size is begun; so the first sizes count most
EXPERT_ROWS = (128, 16)
ROUTER_ROWS = 512
WIDEST = (512, 1024)  # D, F; rates of larger products are those of these
MOST_EXPERTS = 32  # in the comparison of threads, or two a thread: fewer never run side by side
THREAD_ROWS = (8, 24)  # a thread, tried in this order
TORCH, ONEDNN = "torch", "onednn"  # values of train.cpu.products

Clock = Callable[[], float]
Work = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A linear layer of weight [F, D] on n rows."""

    rows: int
    inner: int
    outer: int

    @property
    def bounded(self) -> Shape:
        return replace(self, inner=min(self.inner, WIDEST[0]), outer=min(self.outer, WIDEST[1]))


@dataclass(frozen=True)
class Calibration:
    """``settings`` with nothing left open that could be measured; ``seconds`` by library of products, if these were
    measured."""

    settings: CpuConfig
    seconds: Mapping[str, float]
    threads: int = 1

    @property
    def lines(self) -> list[str]:
        """For the log; none of what was not measured."""
        told = []
        if self.seconds:
            times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in self.seconds.items())
            told.append(f"products in fp32: {self.settings.products} ({times}); train.cpu.products sets another")
        if (rows := self.settings.rows_for_all_threads) is not None and self.threads > 1:
            small = f"experts of fewer than {rows * self.threads} rows" if rows else "no experts"
            where = f"run side by side on {self.threads} threads"
            told.append(f"{small} {where}; train.cpu.rows_for_all_threads sets another number")
        return told


def calibrate(
    settings: CpuConfig,
    moe: MoEConfig,
    hidden_size: int,
    dtype: torch.dtype,
    tensor_size: int = 1,
    expert_size: int = 1,
) -> Calibration:
    """Measure what ``settings`` leave open, for the threads that torch has in this process. ``dtype``: of the
    experts; the router is in fp32 always. The sizes are those of tensor and expert parallelism."""
    threads, seconds = torch.get_num_threads(), {}
    experts, router = shapes_of(moe, hidden_size, tensor_size)
    if settings.products == "auto":
        if HAS_ONEDNN:
            # On one thread, whose CPU time does not depend on other jobs. Several threads wait for each other, and
            # beside other jobs one such wait is longer than all products.
            with one_thread():
                in_fp32 = [*experts, router] if dtype is torch.float32 else [router]
                seconds = time_products(in_fp32, time.process_time)
        settings = settings.model_copy(update={"products": chosen(seconds, TORCH)})
    if settings.rows_for_all_threads is None and threads > 1:
        count = _widest(moe).num_experts // expert_size

        def seconds_at(rows: int) -> dict[str, float]:
            stack = _stack(moe.activation, count, experts[0].bounded, dtype, settings.products)
            return time_threads(stack, rows, time.perf_counter)

        rows = rows_side_by_side(seconds_at)
        settings = settings.model_copy(update={"rows_for_all_threads": rows})
    return Calibration(settings, seconds, threads)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shapes_of(moe: MoEConfig, hidden_size: int, tensor_size: int) -> tuple[list[Shape], Shape]:
    """Of the widest experts of an MoE layer, and of its router."""
    width = (_widest(moe).expert_hidden_size or 0) // tensor_size
    up = ACTIVATIONS[moe.activation].width * width
    of_experts = [(Shape(n, hidden_size, up), Shape(n, width, hidden_size)) for n in EXPERT_ROWS]
    return list(itertools.chain(*of_experts)), Shape(ROUTER_ROWS, hidden_size, moe.router_outputs)


def _widest(moe: MoEConfig) -> ExpertGroupConfig:
    return max(moe.groups, key=lambda group: group.expert_hidden_size or 0)


def _stack(activation: str, count: int, first: Shape, dtype: torch.dtype, products: str) -> ExpertStack:
    """``count`` experts, or as many as are needed to compare threads. ``first``: of their first product."""
    count = min(count, max(MOST_EXPERTS, 2 * torch.get_num_threads()))
    width = first.outer // ACTIVATIONS[activation].width
    up_EFD = torch.ones(count, width * ACTIVATIONS[activation].width, first.inner, dtype=dtype)
    down_EDF = torch.ones(count, first.inner, width, dtype=dtype)
    return ExpertStack(up_EFD, down_EDF, activation, cpu_config=CpuConfig(products=products))


def chosen(seconds: Mapping[str, float], plain: str) -> str:
    """The fastest way if it beats ``plain`` by ``MARGIN``, else ``plain``; so, too, where nothing was measured."""
    fastest = min(seconds, key=lambda name: seconds[name], default=plain)
    return fastest if fastest != plain and seconds[fastest] < (1 - MARGIN) * seconds[plain] else plain


def rows_side_by_side(seconds_at: Callable[[int], Mapping[str, float]]) -> int:
    """The most rows a thread, of ``THREAD_ROWS``, up to which ``side by side`` is the better way; 0 if never."""
    better = itertools.takewhile(lambda rows: chosen(seconds_at(rows), "in turn") != "in turn", THREAD_ROWS)
    return max(better, default=0)


def time_products(shapes: Sequence[Shape], clock: Clock) -> dict[str, float]:
    """Seconds of one forward and backward pass by library, over the ``shapes`` that the budget lets it measure."""
    seconds = dict.fromkeys((TORCH, ONEDNN), 0.0)
    until = clock() + BUDGET
    for shape in shapes:
        layer = _linear_layer(shape.bounded)
        times = fastest_spells({name: partial(layer, name) for name in seconds}, clock)
        seconds = {name: seconds[name] + times[name] for name in seconds}
        if clock() > until:
            break
    return seconds


def time_threads(stack: ExpertStack, rows: int, clock: Clock) -> dict[str, float]:
    """Seconds of a forward pass of experts with ``rows`` a thread each, ``in turn`` and ``side by side``. The gain of
    the second depends on the number of experts, since each pass has to wake the threads."""
    count = len(stack.up_EFD)
    slots_n1 = torch.arange(count).repeat(rows * torch.get_num_threads())[:, None]
    plan, _ = plan_of_slots(slots_n1, count)
    x_nD = torch.zeros(len(slots_n1), stack.up_EFD.shape[2], dtype=stack.up_EFD.dtype)
    weights_n = torch.ones(len(slots_n1))

    def work(rows_for_all_threads: int) -> Work:
        settings = stack.cpu_config.model_copy(update={"rows_for_all_threads": rows_for_all_threads})
        return torch.no_grad()(partial(blocked, x_nD, weights_n, plan, replace(stack, cpu_config=settings)))

    return fastest_spells({"in turn": work(0), "side by side": work(2 * rows)}, clock)


def fastest_spells(ways: Mapping[str, Work], clock: Clock) -> dict[str, float]:
    """The least seconds of each over ``SPELLS``, in turn, after a first call that builds kernels and fills caches."""
    for work in ways.values():
        work()
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(SPELLS):
        for name, work in ways.items():
            start = clock()
            work()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def _linear_layer(shape: Shape) -> Callable[[str], None]:
    """Its three products, as ``blocked.py`` computes them."""
    x_nD, weight_FD = torch.ones(shape.rows, shape.inner), torch.ones(shape.outer, shape.inner)
    grad_nF, grad_nD = torch.ones(shape.rows, shape.outer), torch.empty(shape.rows, shape.inner)
    grad_FD = torch.empty_like(weight_FD)

    @torch.no_grad()
    def products_of(products: str) -> None:
        matmul(x_nD, weight_FD.t(), products)
        matmul_into(grad_nD, grad_nF, weight_FD, products)
        matmul_into(grad_FD, grad_nF.t(), x_nD, products)

    return products_of
