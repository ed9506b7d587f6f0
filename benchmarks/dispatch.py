"""Bytes and seconds of token dispatch and combine over ranks, beside megatron-core's and DeepSpeed's.

Ranks are forked processes with gloo. All contenders get the same tokens and router logits, moves tokens to
experts that only weigh them, and brings them back, forward and backward, in turn in the same processes;
medians over repeats, of the slowest rank. Outputs and gradients are compared with ours first.

Legend. sent: bytes that leave a rank for another, all ranks, forward and backward. / bound: sent over the
least that can be, a row there and back for each (token, other rank that has an expert of it). bytes ours
/ theirs: below 1, we send less. time theirs / ours: above 1, we are faster. On gloo ranks that share a
machine a transfer is a copy in memory, so times say little of a network.

The second table is of skewed routing without and with lending of experts (dispatching/lending.py): rows of the
fullest rank over the mean, the experts that are lent, the bytes of their weights and gradients, all bytes, and time.

Prints both tables and, as its last line, one JSON object: ``bytes_vs_bound`` (ours / bound),
``bytes_vs_megatron`` and ``bytes_vs_deepspeed`` (ours / theirs), ``time_vs_megatron`` and
``time_vs_deepspeed`` (theirs / ours): geometric means over the points. Of the recorded routing in the second table
``imbalance_before`` and ``imbalance_after`` (max/mean, geometric means) and ``lent_bytes`` (weights and gradients of
lent experts, all points).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks, over_ranks, slowest_rank
from benchmarks.common.start_deepspeed import start_deepspeed
from benchmarks.dispatching.contenders import (
    DEEPSPEED,
    LOSSY,
    MEGATRON,
    OURS,
    Contender,
    Task,
    available,
)
from benchmarks.dispatching.lending import COLUMNS, Lent, measure_lending, print_lending, summary_of_lending
from benchmarks.dispatching.traffic import least_bytes
from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.counting import CollectiveCounter
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group

EXPERTS, RANKS = 32, (2, 4)
TIMEOUT = 900.0  # seconds for all points of a number of ranks
CLOSE = 1e-5  # of the largest value: fp32 sums in another order


@dataclass(frozen=True)
class Row:
    """One contender at one point: bytes of all ranks, and seconds."""

    sent: float
    bound: float
    seconds: float


Results = dict[str, dict[str, Row]]  # point -> contender -> row


def forward_backward(contender: Contender, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the gradients of tokens and logits of half its sum of squares."""
    out = contender(x, logits)
    x_grad, logits_grad = torch.autograd.grad(out, (x, logits), out.detach())
    return out.detach(), x_grad, logits_grad


def measure(tasks: list[Task], repeats: int) -> Results:
    """On every rank; all ranks know the same results."""
    results: Results = {}
    with process_group(timeout_minutes=5):
        contenders = available()
        if DEEPSPEED in contenders:
            start_deepspeed()
        for task in tasks:
            ranks = dist.get_world_size()
            groups = build_groups(resolve_degrees(ParallelConfig(expert_parallel_size=ranks), task.experts, ranks))
            built = {name: build(task, groups) for name, build in contenders.items()}
            results[task.name] = measure_task(task, groups, built, repeats)
            destroy_groups()
    return results


def measure_task(task: Task, groups: Groups, contenders: dict[str, Contender], repeats: int) -> dict[str, Row]:
    rank, ranks = groups.expert_rank, groups.expert_size
    x, logits = task.inputs(rank)
    expert_ids = logits.detach().topk(task.top_k).indices
    bound = least_bytes(expert_ids, task.experts, rank, ranks, task.hidden_size * x.element_size())
    sent = {}
    reference = forward_backward(contenders[OURS], x, logits)
    for name, contender in contenders.items():  # also the warm-up
        with CollectiveCounter() as counter:
            found = forward_backward(contender, x, logits)
        sent[name] = counter.sent
        if name not in LOSSY:
            check_equal(name, found, reference)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            times[name].append(slowest_rank(seconds(contender, x, logits)))
    return {
        name: Row(over_ranks(sent[name]), over_ranks(bound), statistics.median(times[name])) for name in contenders
    }


def check_equal(name: str, found: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    """Raises AssertionError where a contender computes something else than ours."""
    for what, a, b in zip(("output", "token gradient", "logit gradient"), found, reference, strict=True):
        apart = float((a - b).abs().max() / b.abs().max())
        assert apart < CLOSE, f"{name}: {what} is {apart:.1e} of the largest value from ours"


def seconds(contender: Contender, x: Tensor, logits: Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    forward_backward(contender, x, logits)
    return time.perf_counter() - began


def summary(points: list[dict[str, Row]]) -> dict[str, float]:
    """Geometric means over the points."""

    def mean(values: list[float]) -> float:
        return round(statistics.geometric_mean(values), 3)

    found = {"bytes_vs_bound": mean([point[OURS].sent / point[OURS].bound for point in points])}
    for peer in (MEGATRON, DEEPSPEED):
        if peer in points[0]:
            found[f"bytes_vs_{peer}"] = mean([point[OURS].sent / point[peer].sent for point in points])
            found[f"time_vs_{peer}"] = mean([point[peer].seconds / point[OURS].seconds for point in points])
    return found


def print_rows(ranks: int, results: Results) -> None:
    for point, rows in results.items():
        for name, row in rows.items():
            our_share, their_time = rows[OURS].sent / row.sent, row.seconds / rows[OURS].seconds
            print(f"{ranks:>5} {point:<12} {name:<17}{row.sent / 1e6:>9.2f}{row.sent / row.bound:>9.3f}"
                  f"{our_share:>14.3f}{1e3 * row.seconds:>9.1f}{their_time:>14.2f}")  # fmt: skip


def main() -> None:
    """Measure over 2 and 4 ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller tokens, few repeats")
    args = parser.parse_args()
    tokens, hidden_size, repeats = (512, 256, 3) if args.quick else (4096, 512, 7)
    tasks = [Task(tokens, hidden_size, EXPERTS, top_k, skewed) for top_k in (2, 8) for skewed in (False, True)]
    torch.set_num_threads(1)
    available()
    print(f"T = {tokens} tokens a rank, D = {hidden_size}, fp32, E = {EXPERTS}")
    print(f"{'ranks':>5} {'point':<12} {'':<17}{'sent MB':>9}{'/ bound':>9}{'ours / theirs':>14}{'ms':>9}"
          f"{'theirs / ours':>14}")  # fmt: skip
    points: list[dict[str, Row]] = []
    for ranks in RANKS:
        results = on_ranks(ranks, measure, tasks, repeats, timeout=TIMEOUT)
        print_rows(ranks, results)
        points += results.values()
    print(f"\n{'ranks':>5} {'':<18}" + "".join(f"{column:>9}" for column in COLUMNS))
    recorded: list[Lent] = []
    for ranks in RANKS:
        lent = on_ranks(ranks, measure_lending, repeats, timeout=TIMEOUT)
        print_lending(ranks, lent)
        recorded += (row for name, row in lent.items() if name.startswith("recorded"))
    print(json.dumps(summary(points) | summary_of_lending(recorded)))


if __name__ == "__main__":
    main()
