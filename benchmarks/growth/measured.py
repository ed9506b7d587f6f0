"""One step of a layout: what the counter saw beside what the plan says, on this rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.stepping.workload import random_batch, valid_tokens
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.parallel.collectives import exchange_counts
from mmmoe_pretrain.parallel.counting import POINT_TO_POINT, CollectiveCounter, Ranks, Total
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan.build import meta_models
from mmmoe_pretrain.plan.communication import Microbatch, Routed, Transfer, parameters_of
from mmmoe_pretrain.plan.traffic import engine_traffic

Key = tuple[str, Ranks]  # of a collective; of messages between two ranks, the kind alone
Totals = dict[Key, Total]


@dataclass(frozen=True)
class Comparison:
    """Of one rank. ``planned`` knows the routing; ``expected`` takes every set of K experts as likely.
    ``rows``: that left for other ranks; ``most_rows``: more than any routing makes leave."""

    measured: Totals
    planned: Totals
    expected: Totals
    rows: float
    most_rows: float


class Routes:
    """Counts at the dispatchers of a rank's MoE layers: rows and assignments to each rank of the expert
    group, by MoE layer and microbatch."""

    def __init__(self, engine: Engine) -> None:
        self.groups = engine.groups
        self.sent: list[list[Tensor]] = []  # [R, 2] each: rows, assignments
        for model in engine.models:
            for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
                self.sent.append([])
                listening: Any = SimpleNamespace(run=self._listen(layer, self.sent[-1]))
                layer.dispatcher = listening

    def _listen(self, layer: MoELayer, sent: list[Tensor]) -> Any:
        run, local = layer.dispatcher.run, layer.config.num_experts // self.groups.expert_size

        def listen(x_nD: Tensor, slots_nK: Tensor, *rest: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:  # a backward pass computes the layer again
                return run(x_nD, slots_nK, *rest)
            rank_nK = slots_nK // local
            per_rank_nR = torch.nn.functional.one_hot(rank_nK, self.groups.expert_size).sum(1)
            sent.append(torch.stack([(per_rank_nR > 0).sum(0), per_rank_nR.sum(0)], dim=1))
            return run(x_nD, slots_nK, *rest)

        return listen

    def clear(self) -> None:
        for sent in self.sent:
            sent.clear()

    def routed(self) -> list[list[Routed]]:
        """By microbatch, then MoE layer."""
        return [[self._routed(sent[i]) for sent in self.sent] for i in range(len(self.sent[0]))]

    def _routed(self, out_R2: Tensor) -> Routed:
        own = self.groups.expert_rank
        away = [
            (table_R2.sum(0) - table_R2[own]).tolist()
            for table_R2 in (out_R2, exchange_counts(out_R2, self.groups.expert))
        ]
        (rows_out, assignments_out), (rows_in, assignments_in) = away
        return Routed(rows_out, rows_in, assignments_out, assignments_in)


def compare(config: RunConfig, samples: int) -> Comparison:
    """The second step on random samples. On every rank of the job; ``destroy_groups`` afterwards."""
    layout = resolve_layout(config, dist.get_world_size())
    groups = build_groups(layout)
    engine = build_engine(config, groups, torch.device("cpu"))
    stages = [model.stage for model in engine.models]
    held = [parameters_of(model) for model in meta_models(config, groups, stages)]  # ZeRO-3 empties the engine's own
    number = config.train.num_microbatches
    batches = [random_batch(config, samples, 1000 * groups.data_rank + i) for i in range(number)]
    routes = Routes(engine)
    engine.step(batches, 1e-3)
    routes.clear()
    with CollectiveCounter() as counter:
        engine.step(batches, 1e-3)

    routed = routes.routed() if routes.sent else [[] for _ in batches]
    names = ranks_of_groups(groups)

    def planned(routing: Sequence[Sequence[Routed]]) -> Totals:
        made = [microbatch_of(batch, own) for batch, own in zip(batches, routing, strict=True)]
        return totals_of(engine_traffic(config, layout, stages, held, made), names)

    moe, k = config.moe, config.moe.experts_per_token
    likely = [
        [plan.routed_of(moe, valid_tokens(batch), layout.expert) for _ in own]
        for batch, own in zip(batches, routed, strict=True)
    ]
    most = 0
    for batch, own in zip(batches, routed, strict=True):
        tokens = valid_tokens(batch)
        most += len(own) * (tokens * k if moe.expert_attention_size else plan.most_rows(tokens, k, layout.expert))
    rows = sum(route.rows_out for own in routed for route in own)
    return Comparison(measured_totals(counter), planned(routed), planned(likely), rows, most)


def microbatch_of(batch: Batch, routed: Sequence[Routed]) -> Microbatch:
    return Microbatch(
        tokens=valid_tokens(batch),
        samples=len(batch.metas),
        discrete_tokens=batch.inputs["text"]["ids"].shape[0],
        targets=sum(len(targets) for targets in batch.targets.values()),
        routed=tuple(routed),
    )


def ranks_of_groups(groups: Groups) -> dict[str, Ranks]:
    """Global ranks by the plan's names."""
    from megatron.core import parallel_state

    found = {
        plan.DATA: groups.data,
        plan.EXPERT: groups.expert,
        plan.EXPERT_DATA: groups.expert_data,
        plan.TENSOR: groups.tensor,
        plan.PIPELINE: groups.pipeline,
        plan.MODEL: parallel_state.get_model_parallel_group(),
        plan.EXPERT_MODEL: parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        plan.WORLD: dist.group.WORLD,
    }
    return {name: tuple(sorted(dist.get_process_group_ranks(group))) for name, group in found.items()}


def totals_of(transfers: Sequence[Transfer], ranks_of: dict[str, Ranks]) -> Totals:
    found: Totals = defaultdict(Total)
    for transfer in transfers:
        ranks = () if transfer.kind == POINT_TO_POINT else ranks_of[transfer.group]
        found[transfer.kind, ranks] += Total(transfer.calls, transfer.sent)
    return dict(found)


def measured_totals(counter: CollectiveCounter) -> Totals:
    found: Totals = defaultdict(Total)
    for (kind, ranks), total in counter.totals().items():
        found[kind, () if kind == POINT_TO_POINT else ranks] += total
    return dict(found)
