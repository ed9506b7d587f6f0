"""The bytes that the plan says, against the tensors that both engines hold; exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.megatron_setup import inner_optimizers
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.communication import Parameter
from mmmoe_pretrain.plan.memory import Held, estimate_peak, held_bytes
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import (
    LAYOUTS,
    LEARNING_RATE,
    MICROBATCHES,
    OTHER_BLOCKS,
    SGD,
    Case,
    global_microbatch,
)

Pair = tuple[Held, Held]


def cases(layout: str) -> list[Case]:
    """bf16 has parameters of either size; DeepSpeed keeps fp32 in any case, and does not pipeline."""
    ranks, degrees = LAYOUTS[layout]
    moe = OTHER_BLOCKS if layout in ("EP2", "TP2") else {}  # stacks of biases are vectors, and some are cut
    found = [Case(layout, ranks, "megatron", zero, degrees, "bf16", moe=moe) for zero in (0, 1)]
    stages = {"DP2": (0, 1), "EP2": (0, 1, 2, 3), "TP2": (1,), "PP2": ()}[layout]
    found += [Case(layout, ranks, "deepspeed", zero, degrees, moe=moe) for zero in stages]
    if layout == "DP2":
        found.append(Case(layout, ranks, "megatron", 0, degrees, "bf16", moe=moe, optimizer=SGD))
        found.append(Case(layout, ranks, "deepspeed", 3, degrees, moe=moe, optimizer=SGD))
    return found


@pytest.mark.parametrize("layout", ["DP2", "EP2", "TP2", "PP2"])
def test_planned_bytes_are_those_of_the_engine(layout: str) -> None:
    deepspeed.prepare()  # before the fork: its import takes seconds
    made = cases(layout)
    for rank, pairs in enumerate(run_ranks(2, planned_and_found, made)):
        for case, (planned, found) in zip(made, pairs, strict=True):
            assert planned == found, (case.name, rank)


def test_shares_add_up_to_all_parameters_with_any_padding() -> None:
    config = Case("x", 1, "megatron", 1, {}).config(Path("."))
    layout = resolve_layout(config, 4)
    parts = [Parameter(numel, 2, expert=False) for numel in (1, 65, 1000, 3)]
    held = [held_bytes(layout, [parts], config.optimizer.state, data_rank=rank) for rank in range(4)]
    assert sum(h.optimizer for h in held) == 8 * 1069
    assert sum(h.masters for h in held) == 4 * 1069
    # from the last to the first: 3 at 0, 1000 at 64, 65 at 1088, 1 at 1216; 1217 numbers padded to 128s
    assert {h.weights for h in held} == {2 * 1280}


def test_peak_memory_is_extrapolated_linearly_from_two_points() -> None:
    """7 bytes a token and 100 a step."""
    assert estimate_peak(1000, smaller=(10, 170), larger=(30, 310), tokens=50) == (1450, 7)


def planned_and_found(made: Sequence[Case]) -> list[Pair]:
    """On each rank."""
    with process_group(timeout_minutes=1) as device:
        return [one_case(case, device) for case in made]


def one_case(case: Case, device: torch.device) -> Pair:
    config = case.config(Path("."))
    layout = resolve_layout(config, case.ranks)
    groups = groups_of(config.parallel, config.moe.group_sizes)
    engine: Any = build_engine(config, groups, device)
    batches = [global_microbatch(config, i, groups.data_rank, groups.data_size) for i in range(MICROBATCHES)]
    stages = build(config, case.ranks, groups).ranks[groups.pipeline_rank].parameters
    found = of_megatron(engine) if case.engine == "megatron" else of_deepspeed(engine, batches)
    replica = groups.data_rank // groups.expert_size
    planned = held_bytes(layout, stages, config.optimizer.state, groups.data_rank, replica)
    destroy_groups()
    return planned, found


def of_megatron(engine: Any) -> Held:
    parameters = [p for model in engine.models for p in model.parameters()]
    buffers = [b for wrapped in engine.wrapped for b in (*wrapped.buffers, *wrapped.expert_parallel_buffers)]
    inner = inner_optimizers(engine.optimizer)
    mains = [main for each in inner for group in each.optimizer.param_groups for main in group["params"]]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    masters = [main for main in mains if main.untyped_storage().data_ptr() not in weights]
    moments = [state[key] for each in inner for state in each.optimizer.state.values()
               for key in engine.config.optimizer.state]  # fmt: skip
    return Held(stored(parameters), stored(b.grad_data for b in buffers), stored(masters), stored(moments))


def of_deepspeed(engine: Any, batches: list[Any]) -> Held:
    """Gradients are there between the backward pass and the optimizer's step."""
    optimizer, step, gradients = engine._engine.optimizer, engine._engine.step, []
    parameters = list(engine.model.parameters())

    def watched() -> Any:
        if engine.stage == 0:
            gradients.append(stored(p.grad for p in parameters))
        elif engine.stage == 3:
            gradients.append(stored([optimizer.grad_partitions_flat_buffer]))
        else:
            averaged = [g for of_group in optimizer.averaged_gradients.values() for g in of_group]
            gradients.append(sum(g.numel() * g.element_size() for g in averaged))  # some are views of whole ones
        return step()

    engine._engine.step = watched
    engine.step(batches, LEARNING_RATE)
    if engine.stage == 0:
        weights, masters, states = stored(parameters), 0, optimizer.state
    elif engine.stage == 3:
        weights, states = stored(p.ds_tensor for p in parameters), optimizer.optimizer.state
        masters = stored(optimizer.fp32_partitioned_groups_flat)
    else:
        weights, states = stored(parameters), optimizer.optimizer.state
        masters = stored(optimizer.single_partition_of_fp32_groups)
    kept = stored(state[key] for state in states.values() for key in engine.config.optimizer.state)
    return Held(weights, gradients[0], masters, kept)


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
