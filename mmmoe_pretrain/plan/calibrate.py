"""Measures the machine at hand for ``mmmoe plan --calibrate``: a ``Machine`` that ``machines.save`` writes.

``calibrate`` takes well under two minutes: products by size and type as the model uses them, the
experts' grouped product, attention, memory bandwidth, the optimizer's step, and the host's times (``host_time.py``).
``add_links`` runs on several ranks and adds collectives by kind.
``fit`` compares plans with measured steps of a few layouts and sets ``Machine.factors``.

Of several spells of computation, and of steps, the shortest counts, since other work on a machine only adds. Of calls
between ranks the middle half counts, since the system places their threads differently each time, also in a run. A
clock of CPU time measures a busy machine; on a GPU it is the wall's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import HALF_TYPES
from mmmoe_pretrain.models.attend import AttentionPlan, attend
from mmmoe_pretrain.moe.experts import make_experts
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.parallel.agreement import from_rank_0
from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT, REDUCE_SCATTER, RING
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups
from mmmoe_pretrain.plan.host_time import Clock, dispatch_time, host_times, slowest
from mmmoe_pretrain.plan.machines import GPUS, PARTS, Collective, Curve, Machine, load, machine_of

SIZES = (32, 64, 128, 256, 512, 1024)  # smallest dimension of a product; the others are WIDE or more
WIDE = 512
EXPERT_ROWS = (32, 128, 512)
LENGTHS = (32, 128, 512)  # of segments that attend
STREAMED, ACTIVATION = 64 << 20, 4 << 20  # bytes of the buffer that is copied
OPTIMIZED = 1 << 22  # parameters of the optimizer that is stepped
SPELL, SPELLS = 0.02, 3  # seconds at least, and how often
MESSAGES = (1 << 10, 1 << 16, 1 << 19, 1 << 22)  # numbers in those that are timed
MOST_CALLS, SPELLS_OF_LINKS = 8, 12  # as many on every rank
MOST_EXPERTS = 8  # that each rank holds while ranks are measured beside one another
BETWEEN = 128  # rows of the products between two calls
LIMITS = (0.1, 10.0)  # of fitted factors
Work = Callable[[], object]


def wall_clock(device: torch.device) -> Clock:
    """Seconds, when the device has done what it was given."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return read


def host_clock(device: torch.device) -> Clock:
    """Of the host's time: on a CPU that of this thread, which runs all operations, without its waits for messages and
    for other processes. On a GPU, whose backward pass has a thread of its own, the wall's."""
    return time.thread_time if device.type == "cpu" else wall_clock(device)


def seconds_of(work: Callable[[], object], clock: Clock) -> float:
    """Of one run, the least over spells that are long enough for the clock."""
    return min(spells_of(work, clock, SPELLS))


def spells_of(work: Callable[[], object], clock: Clock, spells: int) -> list[float]:
    """Seconds of one run in each spell."""
    work()
    repeat, found = 1, list[float]()
    while len(found) < spells:
        began = clock()
        for _ in range(repeat):
            work()
        taken = clock() - began
        if taken < SPELL:
            repeat *= 4
        else:
            found.append(taken / repeat)
    return found


def calibrate(config: RunConfig, device: torch.device, clock: Clock | None = None, name: str = "measured") -> Machine:
    """The machine without its links. Needs a process group without other groups, all of whose ranks must call it:
    rank 0 measures while the others wait, and they step together for what the host takes. What cannot be measured
    (memory, power, links, the vendor's peak) is that of the known GPU, or of ``cpu``."""
    read = clock or wall_clock(device)
    rates = from_rank_0(build_host_groups(timeout_minutes=60).storage, lambda: _rates(config, device, read))
    destroy_groups()
    base = _known(device)
    peak = dict(base.peak)
    if device.type == "cpu":
        products, grouped = rates["products"], rates["grouped"]
        peak |= {p: max(rate for _, rate in (*curve, *grouped.get(p, ()))) for p, curve in products.items()}
    tables = {key: {**getattr(base, key), **rates.pop(key)} for key in ("products", "grouped", "attention")}
    source = f"measured with torch {torch.__version__}; memory, power and, without torchrun, links: {base.source}"
    host = host_times(config, device, host_clock(device))
    return base.model_copy(update={**rates, **tables, "name": name, "source": source, "peak": peak, "host": host})


def calibrate_ranks(config: RunConfig, device: torch.device, file: Path) -> Machine:
    """``calibrate``, and on several ranks ``add_links``: to the machine in ``file``, if there is one. Without it the
    host's times, which ``calibrate`` measures on all ranks at once, become those of a rank alone, as a plan
    multiplies them by ``crowded``."""
    size = dist.get_world_size()
    if size == 1:
        return calibrate(config, device, name=file.stem)
    begun = from_rank_0(build_host_groups(timeout_minutes=5).storage, lambda: _read(file))
    destroy_groups()
    if begun is not None:
        node = _known(device).ranks_per_node
        return add_links(begun.model_copy(update={"ranks_per_node": node}), config, device)
    machine = add_links(calibrate(config, device, name=file.stem), config, device)
    slower = machine.slowed("host", size)
    host = {key: seconds / slower for key, seconds in machine.host.model_dump(exclude={"dispatch"}).items()}
    return machine.model_copy(update={"host": machine.host.model_copy(update=host)})


def _read(file: Path) -> Machine | None:
    """None where there is no file, or one that has to be written again."""
    try:
        return load(file) if file.exists() else None
    except ValueError:
        return None


def _known(device: torch.device) -> Machine:
    """What is not measured. A node has the ranks that this job has on it if the job has several nodes, else at least
    one for each core."""
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / cores
        world = os.environ.get("WORLD_SIZE", "1")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        node = here if here < int(world) else max(GPUS["cpu"].ranks_per_node, cores, here)
        return GPUS["cpu"].model_copy(update={"cores": cores, "memory": memory, "ranks_per_node": node})
    machine = machine_of(torch.cuda.get_device_name(device))
    return machine or GPUS["h100"].model_copy(update={"source": "an H100, since this GPU is not in the table"})


def _rates(config: RunConfig, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Fields of ``Machine`` that one process measures."""
    precision = config.train.precision
    dtype = HALF_TYPES.get(precision, torch.float32)

    def curve(sizes: Sequence[int], made: Callable[[int], tuple[Work, float]]) -> Curve:
        """FLOP/s by size."""
        works = ((size, *made(size)) for size in sizes)
        return tuple((float(size), flops / seconds_of(work, clock)) for size, work, flops in works)

    def product(size: int) -> tuple[Work, float]:
        wide = max(size, WIDE)
        return _linear(size, wide, dtype, device), 6.0 * size * wide * wide

    experts = () if config.moe.dense else curve(EXPERT_ROWS, lambda rows: _experts(config, rows, dtype, device))
    attention = curve(LENGTHS, lambda length: _attention(config, length, dtype, device))
    streaming = 2 * STREAMED / seconds_of(_copy(device, STREAMED), clock)
    return {
        "products": {precision: curve(SIZES, product)},
        "grouped": {precision: experts} if experts else {},
        "attention": {precision: attention},
        "streaming": streaming,
        "optimizer_bytes": seconds_of(_optimizer(device), clock) / OPTIMIZED * streaming,
    }


def _linear(rows: int, wide: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A linear layer, forward and backward."""
    x = torch.randn(rows, wide, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(wide, wide, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, wide, device=device, dtype=dtype)
    return lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), grad)


def _experts(config: RunConfig, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Work, float]:
    """The experts of the config's MoE layer, forward and backward, with ``rows`` each, and its FLOPs."""
    moe, hidden = config.moe, config.model.hidden_size
    experts = make_experts(moe, hidden, SINGLE).to(device=device, dtype=dtype)
    weights = list(experts.parameters())
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.02)
    number = rows * moe.num_experts
    index = torch.arange(number, device=device)
    plan = ExpertPlan(index, [rows] * moe.num_experts, index, index)
    x = torch.randn(number, hidden, device=device, dtype=dtype, requires_grad=True)
    scale, grad = torch.ones(number, device=device), torch.randn(number, hidden, device=device, dtype=dtype)
    flops = 6.0 * rows * sum(weight.numel() for weight in weights)
    return lambda: torch.autograd.grad(experts(x, scale, plan), (x, *weights), grad), flops


def _attention(config: RunConfig, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Work, float]:
    """The scores and their mix, forward and backward, over segments of this length, and its FLOPs."""
    heads, groups = config.model.num_heads, config.model.kv_heads
    size, number = config.model.hidden_size // heads, max(1, 2 * LENGTHS[-1] // length)
    plan = AttentionPlan(AttentionBlocks((length,) * number, (length,) * number), device)
    q, k, v = (
        torch.randn(number * length, h, size, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, groups, groups)
    )
    grad = torch.randn(number * length, heads * size, device=device, dtype=dtype)
    flops = 3.0 * 4 * number * length * length * heads * size
    return lambda: torch.autograd.grad(attend(q, k, v, plan), (q, k, v), grad), flops


def _copy(device: torch.device, size: int) -> Work:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _optimizer(device: torch.device) -> Work:
    """AdamW's step with the gradient's norm, clipping and zeroing, over matrices of a usual size."""
    parameters = [torch.randn(1 << 18, device=device).requires_grad_() for _ in range(OPTIMIZED >> 18)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

    def work() -> None:
        torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, 0.999)
        optimizer.step()
        torch._foreach_mul_(gradients, 1.0)  # as long as zeroing a buffer

    return work


def add_links(machine: Machine, config: RunConfig, device: torch.device, clock: Clock | None = None) -> Machine:
    """On every rank of a process group, all of which must call it: ``machine`` with collectives over all ranks and
    over pairs, ``Host.dispatch``, and on a CPU ``crowded`` of this many ranks. Where ranks outnumber the cores, CPU
    time counts, since others compute while a rank waits."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        raise ValueError("the links between ranks cannot be measured on one rank; start several with torchrun")
    shared = machine.shares_cores(size)
    read = clock or (time.process_time if shared else wall_clock(device))
    groups = {size: dist.group.WORLD}
    if size > 2 and size % 2 == 0:
        pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
        groups[2] = pairs[rank // 2]
    between = _linear(BETWEEN, WIDE, HALF_TYPES.get(config.train.precision, torch.float32), device)
    known = {(one.kind, one.ranks, one.shared): one for one in machine.collectives}
    for ranks, group in sorted(groups.items()):
        messages = [-(-n // ranks) * ranks for n in MESSAGES]  # each rank gets an equal share
        for kind, work in _collectives(ranks, messages, group, device).items():
            curve = tuple(
                (_sent(kind, ranks, n), slowest(_seconds_of_link(work, n, between, read), device)) for n in messages
            )
            known[kind, ranks, shared] = Collective(kind=kind, ranks=ranks, shared=shared, seconds=curve)
    update: dict[str, object] = {"collectives": tuple(known.values())}
    if machine.cores is not None and machine.ranks_per_node > 1:
        update["crowded"] = _crowded(machine, config, device, read)
    machine = machine.model_copy(update=update)
    if shared or config.moe.dense or config.moe.num_experts % size:
        return machine
    host = machine.host.model_copy(update={"dispatch": dispatch_time(config, machine, device, host_clock(device))})
    return machine.model_copy(update={"host": host})


def _crowded(machine: Machine, config: RunConfig, device: torch.device, clock: Clock) -> dict[str, Curve]:
    """``Machine.crowded`` with the times of work like each part's on all ranks over those on rank 0 alone."""
    dtype = HALF_TYPES.get(config.train.precision, torch.float32)
    few = {"num_experts": min(MOST_EXPERTS, config.moe.num_experts), "expert_groups": ()}
    dense, fewer = config.moe.dense, config.model_copy(update={"moe": config.moe.model_copy(update=few)})
    works: dict[tuple[str, ...], Callable[[], Work]] = {
        ("products", "embedders", "heads", "recomputation", "host"): lambda: _linear(BETWEEN, WIDE, dtype, device),
        ("attention",): lambda: _attention(config, LENGTHS[len(LENGTHS) // 2], dtype, device)[0],
        ("memory bound",): lambda: _copy(device, ACTIVATION),
        ("optimizer", "gradient accumulation"): lambda: _optimizer(device),
    } | ({} if dense else {("experts",): lambda: _experts(fewer, BETWEEN, dtype, device)[0]})
    found = dict(machine.crowded)
    ranks = min(dist.get_world_size(), machine.ranks_per_node)
    for parts, make in works.items():
        work = make()
        dist.barrier()
        alone = middle(spells_of(work, clock, SPELLS_OF_LINKS)) if dist.get_rank() == 0 else 0.0
        dist.barrier()
        beside = middle(spells_of(work, clock, SPELLS_OF_LINKS))
        times = max(1.0, slowest(beside, device) / slowest(alone, device))
        for part in parts:
            others = [point for point in found.get(part, ()) if point[0] != ranks]
            found[part] = tuple(sorted([*others, (float(ranks), times)]))
    return found


def _seconds_of_link(work: Callable[[int], object], numbers: int, between: Work, clock: Clock) -> float:
    """Of a call: what it adds to products that run before each, as in a step, and at least the shortest of calls in a
    row, which leave a core to each thread of gloo. All ranks make the same number of calls."""
    calls = max(2, min(MOST_CALLS, MESSAGES[-1] // numbers))

    def call() -> object:
        return work(numbers)

    def spell(*parts: Callable[[], object]) -> float:
        dist.barrier()
        began = clock()
        for _ in range(calls):
            for part in parts:
                part()
        return (clock() - began) / calls

    spell(between, call)  # warms up
    in_turn = [(spell(call), spell(between, call) - spell(between)) for _ in range(SPELLS_OF_LINKS)]
    in_a_row, added = zip(*in_turn, strict=True)
    return max(min(in_a_row), middle(added))


def middle(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter: for times that a machine now and then doubles."""
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _sent(kind: str, ranks: int, numbers: int) -> float:
    """Bytes that leave a rank, as ``parallel/counting.py`` counts them."""
    whole = 4.0 * numbers
    if kind == POINT_TO_POINT:
        return whole
    if kind == ALL_TO_ALL:
        return whole * (ranks - 1) / ranks
    return RING[kind](ranks) * (whole / ranks if kind == ALL_GATHER else whole)


def _collectives(
    ranks: int, messages: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Callable[[int], object]]:
    whole = {numbers: torch.ones(numbers, device=device) for numbers in messages}
    other = {numbers: torch.ones(numbers, device=device) for numbers in messages}
    part = {numbers: torch.ones(numbers // ranks, device=device) for numbers in messages}
    found: dict[str, Callable[[int], object]] = {
        ALL_REDUCE: lambda n: dist.all_reduce(whole[n], op=dist.ReduceOp.MAX, group=group),
        ALL_TO_ALL: lambda n: dist.all_to_all_single(other[n], whole[n], group=group),
        ALL_GATHER: lambda n: dist.all_gather_into_tensor(whole[n], part[n], group=group),
        REDUCE_SCATTER: lambda n: dist.reduce_scatter_tensor(part[n], whole[n], op=dist.ReduceOp.MAX, group=group),
    }
    if ranks == 2:
        mine = dist.get_rank(group)

        def there_and_back(n: int) -> None:
            """Each sends once: a call is one message."""
            calls = (dist.send, dist.recv) if mine == 0 else (dist.recv, dist.send)
            for call in calls:
                call(other[n], group=group, **{"group_dst" if call is dist.send else "group_src": 1 - mine})

        found[POINT_TO_POINT] = there_and_back
    return found


def fit(
    machine: Machine, planned: Sequence[Callable[[Machine], float]], measured: Sequence[float], prior: float = 0.05
) -> Machine:
    """``machine`` with the ``factors`` that bring ``planned`` (seconds of a step on a machine) nearest to
    ``measured``: least squares of relative errors and of ``prior`` times the logarithm of each factor, which keeps at
    1 what the layouts do not tell apart. Gauss-Newton in those logarithms."""
    names = list(PARTS)
    logs = np.zeros(len(names))

    def residuals(values: np.ndarray) -> np.ndarray:
        factors = dict(zip(names, np.exp(values), strict=True))
        seconds = [plan(with_factors(machine, factors)) for plan in planned]
        return np.concatenate([np.log(np.array(seconds) / np.array(measured)), prior * values])

    for _ in range(10):
        here = residuals(logs)
        slopes = np.stack([(residuals(logs + 0.01 * unit) - here) / 0.01 for unit in np.eye(len(names))], axis=1)
        logs = np.clip(logs - np.linalg.lstsq(slopes, here, rcond=None)[0], *np.log(LIMITS))
    return with_factors(machine, dict(zip(names, np.exp(logs), strict=True)))


def with_factors(machine: Machine, factors: Mapping[str, float]) -> Machine:
    """``factors`` by key of ``PARTS``."""
    by_part = {part: float(factors[name]) for name, parts in PARTS.items() for part in parts}
    return machine.model_copy(update={"factors": by_part})
