"""Communication of an optimizer step under DeepSpeed's engine, in closed form, beside that of engine megatron.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py and stage3.py) and held to counts on gloo ranks
(tests/plan/test_zero.py). It works on fp32 parameters (engines/deepspeed_modules.py). Stages 0 to 2 reduce gradients
by an all-reduce, also where a rank keeps a share of them alone, which is twice a reduce-scatter's bytes: once a step,
at stage 2 at each microbatch. Stages 1 and 2 gather the weights after the optimizer. Stage 3 gathers the parameters
for each microbatch and reduces and scatters each gradient. Calls are of reductions in one bucket; bytes do not depend
on buckets.

Not here: parameters below ``param_persistence_threshold``, which stage 3 keeps whole and gathers once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.plan.communication import (
    DATA,
    EXPERT,
    EXPERT_DATA,
    EXPERT_MODEL,
    FP32,
    FP64,
    TENSOR,
    Parameter,
    Transfer,
    padded,
    ring,
)

ALIGNMENT = 2  # numbers of a rank's share of a flat buffer
LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered until the backward pass (stage3_max_live_parameters)

Kind = tuple[str, int, list[Parameter]]  # group, ranks, parameters of one group of the optimizer


def zero_traffic(layout: Layout, parameters: Sequence[Sequence[Parameter]], microbatches: int) -> Iterator[Transfer]:
    """What the engine sends of gradients and parameters over a step."""
    held = [parameter for stage in parameters for parameter in stage]
    groups = optimizer_groups(layout, held)
    yield from _partial_gradients(layout, held, microbatches)
    if layout.zero_stage == 3:
        yield from _sharded(groups, microbatches)
    else:
        yield from _gradients_whole(layout, held, microbatches)
    if layout.zero_stage in (1, 2):
        for group, ranks, members in groups:
            whole = padded(sum(p.numel for p in members), ALIGNMENT * ranks)
            yield ring("parameters", ALL_GATHER, group, ranks, whole // ranks * FP32)
    yield from _norm(layout, groups)


def optimizer_groups(layout: Layout, held: Sequence[Parameter]) -> list[Kind]:
    """Matrices and vectors apart, and experts that are spread over ranks."""
    spread, found = layout.expert > 1, []
    for expert, group, ranks in ((False, DATA, layout.data), (True, EXPERT_DATA, layout.expert_data)):
        for vector in (False, True):
            members = [p for p in held if (p.expert and spread) == expert and p.vector == vector]
            if members:
                found.append((group, ranks, members))
    return found


def _gradients_whole(layout: Layout, held: Sequence[Parameter], microbatches: int) -> Iterator[Transfer]:
    """All that goes over one group, in buckets."""
    times = microbatches if layout.zero_stage == 2 else 1
    for what, expert, group, ranks in (
        ("gradients", False, DATA, layout.data),
        ("expert gradients", True, EXPERT_DATA, layout.expert_data),
    ):
        numel = sum(p.numel for p in held if (p.expert and layout.expert > 1) == expert)
        if numel:
            yield ring(what, ALL_REDUCE, group, ranks, times * numel * FP32, times)


def _sharded(groups: Sequence[Kind], microbatches: int) -> Iterator[Transfer]:
    """Stage 3. Each parameter is padded to shares. Single numbers are what objectives learn, which the engine gathers
    once a step. Calls of a gather are as if all were prefetched together."""
    whole = sum(p.numel for _, _, members in groups for p in members)
    again = 1 if whole <= LIVE else 2  # for the backward pass, too
    for group, ranks, members in groups:
        shares = [-(-p.numel // ranks) for p in members]
        single = sum(share for share, p in zip(shares, members, strict=True) if p.numel == 1)
        times = microbatches * again
        yield ring("parameters", ALL_GATHER, group, ranks, times * (sum(shares) - single) * FP32, times)
        yield ring("objectives' parameters", ALL_GATHER, group, ranks, single * FP32, int(single > 0))
        scattered = microbatches * ranks * sum(shares) * FP32
        yield ring("gradients", REDUCE_SCATTER, group, ranks, scattered, microbatches)


def _partial_gradients(layout: Layout, held: Sequence[Parameter], microbatches: int) -> Iterator[Transfer]:
    """Between tensor ranks, one parameter after the other, in each backward pass."""
    for what, members in (
        ("partial gradients", [p for p in held if p.partial and layout.sequence_parallel]),
        ("replicated gradients", [p for p in held if p.replicated and not (p.partial and layout.sequence_parallel)]),
    ):
        sent = microbatches * sum(p.numel for p in members) * FP32
        yield ring(what, ALL_REDUCE, TENSOR, layout.tensor, sent, microbatches * len(members))


def _norm(layout: Layout, groups: Sequence[Kind]) -> Iterator[Transfer]:
    """Squares of the gradients: of each group of the optimizer, and what different experts have."""
    experts = layout.expert > 1
    if layout.zero_stage == 0:
        if experts:
            yield ring("norm", ALL_REDUCE, EXPERT, layout.expert, FP64)
        yield ring("norm", ALL_REDUCE, TENSOR, layout.tensor, 2 * FP64)
        return
    size = FP64 if layout.zero_stage == 3 else FP32
    for group, ranks, _ in groups:
        yield ring("norm", ALL_REDUCE, group, ranks, size)
        of_experts = experts and group == EXPERT_DATA
        if of_experts and layout.zero_stage == 3:
            yield ring("norm", ALL_REDUCE, EXPERT_MODEL, layout.tensor * layout.expert, size)
            continue
        yield ring("norm", ALL_REDUCE, TENSOR, layout.tensor, size)
        if of_experts:
            yield ring("norm", ALL_REDUCE, DATA, layout.data, size)
