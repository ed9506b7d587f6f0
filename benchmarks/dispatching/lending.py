"""Rows of the fullest rank with and without lending (``moe/lending.py``), on skewed routing.

The recorded routing is of the two MoE layers of a trained run: the experts of 4 x 1,024 held-out tokens. The run was
``mmmoe train configs/demo_mini.yaml moe.num_experts=16 moe.experts_per_token=2 train.steps=150`` without losses of
balance (``moe.losses='{z: 0.0001}'``); ``python -m benchmarks.dispatching.lending RUN`` records another one. Tokens
and weights are random, of the run's sizes. The Zipf loads are drawn (``contenders.Task``). Rows are assignments.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.forked import over_ranks, slowest_rank
from benchmarks.dispatching.contenders import Task
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.config import MoEConfig, ParallelConfig
from mmmoe_pretrain.config.moe import LendingConfig
from mmmoe_pretrain.evaluate.rows import open_rows
from mmmoe_pretrain.moe.dispatch import make_dispatcher
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.lending import Loans
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.parallel.counting import CollectiveCounter
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group

RECORD = Path(__file__).with_name("routing.npz")
RANKS, TOKENS = 4, 1024  # of the record
HIDDEN, EXPERT_HIDDEN, EXPERTS, TOP_K = 128, 512, 16, 2
LENDING = LendingConfig(min_rows=64)  # a rank has 2,048 rows on average, some tens of times fewer than on a GPU
CLOSE = 1e-5  # of the largest value: fp32 sums in another order


COLUMNS = ("max/mean", "lending", "experts", "their MB", "sent MB", "lending", "ms", "lending")


@dataclass(frozen=True)
class Lent:
    """One routing over some ranks, without and with lending: rows of the fullest rank over the mean, bytes that leave
    all ranks forward and backward, and seconds of the slowest. ``experts``: that were lent; ``bytes``: of their
    weights and gradients."""

    imbalance: tuple[float, float]
    sent: tuple[float, float]
    seconds: tuple[float, float]
    experts: int
    bytes: float


def routings() -> dict[str, np.ndarray]:
    """The experts of each rank's tokens, [4, T, K], by name."""
    recorded = {f"recorded {name}": ids for name, ids in np.load(RECORD).items()}
    zipf = Task(TOKENS, HIDDEN, EXPERTS, TOP_K, skewed=True)
    drawn = [zipf.inputs(rank)[1].detach().topk(TOP_K).indices.numpy() for rank in range(RANKS)]
    return {**recorded, "Zipf": np.stack(drawn)}


def measure_lending(repeats: int) -> dict[str, Lent]:
    """On every rank."""
    found = {}
    with process_group(timeout_minutes=5):
        ranks = dist.get_world_size()
        groups = build_groups(resolve_degrees(ParallelConfig(expert_parallel_size=ranks), EXPERTS, ranks))
        for name, ids in routings().items():
            found[name] = _measure(torch.from_numpy(ids[groups.expert_rank].astype(np.int64)), groups, repeats)
        destroy_groups()
    return found


def _measure(ids_TK: Tensor, groups: Groups, repeats: int) -> Lent:
    draw = torch.Generator().manual_seed(groups.expert_rank)
    x_TD = torch.randn(len(ids_TK), HIDDEN, generator=draw, requires_grad=True)
    weights_TK = torch.rand(ids_TK.shape, generator=draw, requires_grad=True)
    layers = [Layer(lending, groups) for lending in (None, LENDING)]
    fullest, sent, results = [], [], []
    for layer in layers:  # also the warm-up
        with CollectiveCounter() as counter:
            results.append(layer.step(x_TD, ids_TK, weights_TK))
        fullest.append(slowest_rank(layer.rows) * groups.expert_size / over_ranks(layer.rows))
        sent.append(over_ranks(counter.sent))
    for plain, other in zip(*results, strict=True):
        apart = float((plain - other).abs().max() / plain.abs().max())
        assert apart < CLOSE, f"lending changes a result by {apart:.1e} of the largest value"
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for which, layer in enumerate(layers):
            dist.barrier()
            began = time.perf_counter()
            layer.step(x_TD, ids_TK, weights_TK)
            times[which].append(slowest_rank(time.perf_counter() - began))
    without, lending = map(statistics.median, times)
    lent = over_ranks(layers[1].lent)
    weights = sum(parameter[0].nbytes for parameter in layers[1].experts.parameters())
    return Lent((fullest[0], fullest[1]), (sent[0], sent[1]), (without, lending), int(lent), 2 * weights * lent)


class Layer:
    """Dispatch and experts. ``rows`` that this rank computed in the latest step, and how many experts it ``lent``."""

    def __init__(self, lending: LendingConfig | None, groups: Groups) -> None:
        config = MoEConfig(num_experts=EXPERTS, expert_hidden_size=EXPERT_HIDDEN, lending=lending)
        self.experts = Experts(groups.local_experts(EXPERTS), HIDDEN, EXPERT_HIDDEN, config, groups)
        for number, parameter in enumerate(self.experts.parameters()):
            draw = torch.Generator().manual_seed(100 + 10 * groups.expert_rank + number)
            parameter.data = torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5
        self.dispatcher: Any = make_dispatcher(config, groups)
        self.rows = self.lent = 0

    def step(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
        """The output, and the gradients of half its sum of squares."""
        out, *_ = self.dispatcher.run(x_TD, ids_TK, weights_TK, self._compute)
        leaves = (x_TD, weights_TK, *self.experts.parameters())
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]

    def _compute(self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, loans: Loans | None = None) -> Tensor:
        self.rows, self.lent = plan.num_assignments, len(loans.lent) if loans else 0
        out: Tensor = self.experts(x_mD, weights_A, plan, loans)
        return out


def print_lending(ranks: int, results: dict[str, Lent]) -> None:
    for name, row in results.items():
        columns = [f"{ratio:.2f}" for ratio in row.imbalance] + [str(row.experts), f"{row.bytes / 1e6:.2f}"]
        columns += [f"{sent / 1e6:.2f}" for sent in row.sent] + [f"{1e3 * seconds:.1f}" for seconds in row.seconds]
        print(f"{ranks:>5} {name:<18}" + "".join(f"{column:>9}" for column in columns))


def summary_of_lending(points: list[Lent]) -> dict[str, float]:
    """Geometric means of the imbalance, and all bytes of weights."""
    before, after = zip(*(point.imbalance for point in points), strict=True)
    return {
        "imbalance_before": round(statistics.geometric_mean(before), 3),
        "imbalance_after": round(statistics.geometric_mean(after), 3),
        "lent_bytes": sum(point.bytes for point in points),
    }


def record(run: Path) -> None:
    """Of a run over ``evaluate.test``."""
    model, config, _ = load_model(run)
    found: dict[str, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Router):
            seen = found.setdefault(f"layer {module.layer}", [])
            module.register_forward_hook(lambda _, __, routing, seen=seen: seen.append(routing.expert_ids_nK))
    with torch.inference_mode():
        for batch, _ in open_rows(run, config, None).batches():
            model(batch)
    count = RANKS * TOKENS
    arrays: dict[str, Any] = {
        name: torch.cat(ids)[:count].view(RANKS, TOKENS, -1).to(torch.uint8).numpy() for name, ids in found.items()
    }
    np.savez_compressed(RECORD, **arrays)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
