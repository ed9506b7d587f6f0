"""The communication of a rank under the engine of its layout: of each microbatch, and once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import is_sparse
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.communication import (
    Microbatch,
    Parameter,
    Transfer,
    model_traffic,
    routed_of,
    step_traffic,
)
from mmmoe_pretrain.plan.zero import zero_traffic


class RankParts(Protocol):
    """What one pipeline rank holds: its stages, and the parameters of each."""

    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def parameters(self) -> Sequence[Sequence[Parameter]]: ...


def engine_traffic(
    config: RunConfig,
    layout: Layout,
    stages: Sequence[Stage],
    parameters: Sequence[Sequence[Parameter]],
    microbatches: Sequence[Microbatch],
) -> list[Transfer]:
    """``communication.step_traffic`` of the layout's engine."""
    if layout.engine == "megatron":
        return step_traffic(config, layout, stages, parameters, microbatches)
    found = model_traffic(config, layout, stages, microbatches)
    found += zero_traffic(layout, parameters, len(microbatches))
    return [transfer for transfer in found if transfer.ranks > 1]


def rank_traffic(
    config: RunConfig, layout: Layout, rank: RankParts, batch: Microbatch, imbalance: float = 1.0
) -> tuple[list[Transfer], list[Transfer]]:
    """Of each microbatch and once a step. Everything is linear in the number of microbatches, so that the closed form
    of none and of one of them gives both."""
    sparse = [i for stage in rank.stages for i in stage.blocks if is_sparse(config.moe, i)]
    routed = []
    for index in sparse:
        moe = config.moe.for_layer(index)
        even = routed_of(moe, batch.tokens, layout.expert)
        rows, assignments = imbalance * even.rows_in, imbalance * even.assignments_in
        routed.append(replace(even, rows_in=rows, assignments_in=assignments))
    full = replace(batch, routed=tuple(routed))
    once, one = (
        _by_purpose(engine_traffic(config, layout, rank.stages, rank.parameters, batches)) for batches in ([], [full])
    )
    each = [
        replace(t, calls=t.calls - once[key].calls, sent=t.sent - once[key].sent) if key in once else t
        for key, t in one.items()
    ]
    return [t for t in each if t.calls], [t for t in once.values() if t.calls]


def _by_purpose(transfers: Sequence[Transfer]) -> dict[tuple[str, str, str], Transfer]:
    sums: dict[tuple[str, str, str, int], list[float]] = {}
    for one in transfers:
        found = sums.setdefault((one.what, one.kind, one.group, one.ranks), [0, 0.0])
        found[0] += one.calls
        found[1] += one.sent
    return {key[:3]: Transfer(*key, int(calls), sent) for key, (calls, sent) in sums.items()}
