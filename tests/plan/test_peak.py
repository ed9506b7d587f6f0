"""Peak memory of a rank by hand: the schedule, buffers, a GPU's paths, long stages. That real steps peak there is in
tests/benchmarks/test_plan.py."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mmmoe_pretrain import kernels
from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.models.attend import AttentionPlan, attend
from mmmoe_pretrain.models.block import rms_norm
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.activations import Imbalance, StageMemory, stage_memory, unevenly
from mmmoe_pretrain.plan.build import build, pretended_groups
from mmmoe_pretrain.plan.communication import Parameter
from mmmoe_pretrain.plan.gpu_paths import gpu_paths
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.memory import held_bytes
from mmmoe_pretrain.plan.peak import (
    engine_buffers,
    fullest_moment,
    in_a_step,
    passes,
    rank_memories,
    sizes_of,
    task_gradients,
)
from mmmoe_pretrain.plan.workload import Workload, full_batch
from tests.support import objectives, tiny_config

ALONE = resolve_layout(tiny_config(Path("unused")), 1)
PP2 = replace(ALONE, pipeline=2)
ZERO = {"engine": "deepspeed", "zero_stage": 2}
PP2_VPP2 = replace(PP2, virtual_pipeline=2)


@pytest.mark.parametrize(
    ("layout", "rank", "microbatches", "order"),
    [
        (ALONE, 0, 2, "F0 B0 F0 B0"),
        (PP2, 0, 3, "F0 F0 B0 F0 B0 B0"),
        (PP2, 1, 3, "F0 B0 F0 B0 F0 B0"),
        (replace(ALONE, pipeline=4), 0, 2, "F0 F0 B0 B0"),  # fewer microbatches than stages
        (PP2_VPP2, 0, 2, "F0 F0 F1 F1 B1 B1 B0 B0"),
        (PP2_VPP2, 1, 2, "F0 F0 F1 B1 F1 B1 B0 B0"),
    ],
)
def test_passes_come_in_the_order_of_1f1b_and_of_the_interleaved_schedule(
    layout: object, rank: int, microbatches: int, order: str
) -> None:
    made = [f"{'FB'[not forward]}{chunk}" for forward, chunk in passes(layout, rank, microbatches)]  # type: ignore[arg-type]
    assert " ".join(made) == order


def test_a_rank_is_fullest_in_the_backward_pass_with_most_microbatches_in_flight() -> None:
    size = StageMemory(kept=10, forward=14, backward=17)
    assert fullest_moment(PP2, 0, 3, [size]) == (20, 7)
    assert fullest_moment(PP2, 1, 3, [size]) == (10, 7)
    high = StageMemory(kept=10, forward=25, backward=17)  # in the forward pass of the second microbatch
    assert fullest_moment(PP2, 0, 3, [high]) == (20, 15)
    # chunk 0 twice, chunk 1 twice, then chunk 1's backward pass
    assert fullest_moment(PP2_VPP2, 0, 2, [size, StageMemory(3, 3, 30)]) == (26, 27)


def test_deepspeed_has_a_bucket_and_gathers_parameters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, parallel=ZERO)
    layout = replace(ALONE, engine="deepspeed", world_size=2, data=2, expert_data=2)
    parameters = [[Parameter(300_000, 4, expert=False), Parameter(50, 4, expert=False)]]
    bucket = 4 * 300_050
    assert engine_buffers(config, replace(layout, zero_stage=0), parameters) == 0
    assert engine_buffers(config, replace(layout, zero_stage=2), parameters) == bucket
    assert engine_buffers(config, replace(layout, zero_stage=3), parameters) == bucket + 4 * 50 + 4 * 300_000
    few = {
        "param_persistence_threshold": 51,
        "max_live_parameters": 10,
        "max_reuse_distance": 20,
        "prefetch_bucket_size": 5,
    }
    sharded = tiny_config(tmp_path, parallel={**ZERO, "deepspeed": {"zero_optimization": few}})
    parts = [[Parameter(numel, 4, expert=False) for numel in (100, 200, 300, 50)]]
    assert engine_buffers(sharded, replace(layout, zero_stage=3), parts) == 4 * (650 + 50 + 300 + 5 + 20 // 2)
    given = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}
    double = tiny_config(tmp_path, parallel={**ZERO, "deepspeed": given})
    assert engine_buffers(double, replace(layout, zero_stage=2), parameters) == 2 * 4 * 1000


def test_zero_2_holds_whole_the_gradients_that_two_ranks_share(tmp_path: Path) -> None:
    """Shares of 50 and 50 of the numbers of three matrices: the second is in both."""
    layout = replace(ALONE, engine="deepspeed", zero_stage=2, world_size=2, data=2, expert_data=2)
    parameters = [[Parameter(numel, 4, expert=False) for numel in (40, 30, 30)]]
    held = held_bytes(layout, parameters, ())
    assert held.gradients == 4 * 50
    assert in_a_step(layout, parameters, held).gradients == 4 * max(40 + 30, 30 + 30)
    assert in_a_step(replace(layout, zero_stage=1), parameters, held).gradients == 4 * 100


def test_on_a_gpu_fused_functions_keep_what_their_kernels_need() -> None:
    """Rows of 16 in bf16: the norm adds its output and a number in fp32 a row, attention its output and one a row and
    head; on a CPU there are copies in fp32 and of rows in buckets."""
    blocks = AttentionBlocks(lengths=(5, 3), full=(5, 3))
    usable = kernels.usable
    with FakeTensorMode(), gpu_paths(), LiveTensors() as live:
        x = torch.empty(8, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(16, requires_grad=True)
        before = live.live
        y = rms_norm(x, weight)
        assert live.live - before == y.nbytes + 8 * 4
        q, k, v = (torch.empty(8, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        plan = AttentionPlan(blocks, q.device)
        plan.varlen  # noqa: B018  # made once for all blocks
        before = live.live
        out = attend(q, k, v, plan)
        assert (
            out.nbytes + 8 * 2 * 4 <= live.live - before < out.nbytes + 8 * 2 * 4 + 64
        )  # and states of random numbers
    assert kernels.usable is usable


def test_a_long_stage_is_planned_from_two_short_ones(tmp_path: Path) -> None:
    model = {"hidden_size": 16, "num_layers": 8, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
    config = tiny_config(tmp_path, model=model, moe={"num_experts": 4, "expert_hidden_size": 8, "every": 2})
    batch = full_batch(config, 2)
    with pretended_groups(resolve_layout(config, 1)) as groups:
        measure = partial(stage_memory, config, groups, batch=batch)
        found, direct = sizes_of(config, Stage(0, 8), measure).memory, measure(Stage(0, 8)).memory
        assert astuple(found) == pytest.approx(astuple(direct), rel=1e-3)


def test_imbalance_costs_the_fullest_rank_activations(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, parallel={"expert_parallel_size": 2})
    made = build(config, 2)
    even, uneven = (rank_memories(made, Workload(4), Imbalance(rank=rank))[0] for rank in (1.0, 1.5))
    assert uneven.activations > even.activations
    assert uneven.weights == even.weights


def test_a_layer_of_other_settings_needs_what_they_need_in_the_whole_model(tmp_path: Path) -> None:
    """Of the two blocks the second one is the only MoE layer."""
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8, "every": 2}
    own = {"num_experts": 8, "experts_per_token": 1}
    configs = [tiny_config(tmp_path, moe=its) for its in ({**moe, "layers": {1: own}}, {**moe, **own})]
    found, expected = (rank_memories(build(config, 2), Workload(2))[0] for config in configs)
    assert found == expected


def test_chunks_of_unequal_length_are_dispatched(tmp_path: Path) -> None:
    """One token more or less in a chunk: the sum is that of chunks as long as each other."""
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8}
    config = tiny_config(tmp_path, moe={**moe, "dispatch_chunks": 4})
    assert full_batch(config, 2).num_valid % 4 == 3
    found, whole = (rank_memories(build(c, 2), Workload(2))[0] for c in (config, tiny_config(tmp_path, moe=moe)))
    assert found.activations == pytest.approx(whole.activations, rel=0.02)


@pytest.mark.parametrize(
    ("total", "parts", "largest", "found"), [(10, 3, 0, [4, 3, 3]), (10, 3, 8, [8, 1, 1]), (2, 3, 5, [2, 0, 0])]
)
def test_assignments_are_spread_over_experts(total: int, parts: int, largest: float, found: list[int]) -> None:
    assert unevenly(total, parts, largest) == found


def test_a_microbatch_to_plan_by_has_full_length(tmp_path: Path) -> None:
    """Of a sample: 2 x 2 image tokens, 6 of audio, 18 of text with its marks; and 17 of text after one of the other
    two, drawn."""
    config = tiny_config(tmp_path, objectives=objectives(captioning={"fraction": 1.0}))
    batch = full_batch(config, 3, first=7)
    before_captions = batch.num_valid - 3 * (4 + 6 + 18) - 3 * 17
    assert before_captions in {4 * images + 6 * (3 - images) for images in range(4)}


def test_gradients_of_two_tasks_are_kept_for_what_they_share_and_the_rest_once() -> None:
    """A quarter of 800 bytes of gradients are of heads: two tasks keep 600 each, and the sum of the rest 800."""
    config = tiny_config(Path("unused"), train={"task_gradients": {"combine": "pcgrad"}})
    assert task_gradients(config, {"heads": 50, "experts": 150}, 800) == 2 * 600 + 800
    assert task_gradients(tiny_config(Path("unused")), {"heads": 50, "experts": 150}, 800) == 0
