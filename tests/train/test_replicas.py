"""Replicas under both engines are equal bit by bit after training; one flipped bit on one rank is found."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.state import ShardedTensor, model_key, split_key
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.replicas import ReplicaReport, check_replicas
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import LAYOUTS, LEARNING_RATE, Case, brief
from tests.layouts.train import microbatches_of
from tests.train.faulty import config_in, events, faulty, on_result, saved, signalled


def train_and_check(cases: list[Case], root: Path, flip: int) -> list[list[ReplicaReport]]:
    """Of each case: after two steps, and with a bit flipped on rank ``flip``."""
    with process_group(1) as device:
        return [_train_and_check(case, root, flip, device) for case in cases]


def _train_and_check(case: Case, root: Path, flip: int, device: torch.device) -> list[ReplicaReport]:
    config = case.config(root)
    groups = groups_of(config.parallel, config.moe.group_sizes)
    engine = build_engine(config, groups, device)
    for step in range(2):
        engine.step(microbatches_of(engine, step), LEARNING_RATE)
    world, state = dist.group.WORLD, engine.export_state()
    models = getattr(engine, "models", None) or [engine.model]  # type: ignore[attr-defined]
    models = models if case.zero_stage else []
    reports = [check_replicas(state, world), check_replicas(state, world, models)]
    if dist.get_rank() == flip:
        name = next(split_key(key)[0] for key in state if key.endswith("router.weight"))
        if models:
            weight = dict(models[0].named_parameters())[name]
        else:
            (weight,) = state[model_key(name)].pieces.values()
        weight.data.view(-1).view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)[3] ^= 1
    reports.append(check_replicas(engine.export_state(), world, models))
    destroy_groups()
    return reports


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicas_are_equal_after_training_and_a_flipped_bit_is_found(tmp_path: Path, ranks: int) -> None:
    deepspeed.prepare()
    megatron = [("megatron", 0, "fp32"), ("megatron", 1, "bf16")]
    zero = [("deepspeed", 0, "fp32"), ("deepspeed", 2, "bf16")]
    kinds = {2: {"DP2": megatron + zero, "TP2 + SP": megatron[:1] + zero[1:]},
             4: {"EP2 x EDP2": megatron[:1] + zero[1:]}}[ranks]  # fmt: skip
    cases = [brief(Case(layout, ranks, engine, stage, LAYOUTS[layout][1], precision))
             for layout, engines in kinds.items() for engine, stage, precision in engines]  # fmt: skip
    outcomes = run_ranks(ranks, train_and_check, cases, tmp_path, ranks - 1, timeout=200)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    for case, (exported, whole, flipped) in zip(cases, outcomes[0], strict=True):
        assert exported.differing == whole.differing == 0, (case.name, str(whole))
        assert whole.compared >= exported.compared > 0, case.name
        # One flipped bit; where a master weight is the memory of the working one, both are found.
        assert flipped.compared == whole.compared and len(flipped.mismatches) == flipped.differing > 0, case.name
        for found in flipped.mismatches:
            assert "router.weight" in found.name, (case.name, str(found))
            assert found.holders == ranks and found.ranks == ((3,) if ranks == 4 else (0, 1)), (case.name, str(found))


def test_numbers_that_one_rank_holds_alone_are_not_compared() -> None:
    def check() -> int:
        with process_group(1):
            rank = dist.get_rank()
            tensor = ShardedTensor((8,), {(4 * rank,): torch.full((4,), float(rank))})
            state = dict.fromkeys(("model/w", "optimizer/w/exp_avg", "optimizer/w/exp_avg_sq"), tensor)
            return check_replicas(state, dist.group.WORLD).compared

    assert run_ranks(2, check) == [0, 0]


def test_ranks_without_a_tensor_and_many_differences_are_reported_alike() -> None:
    def check() -> ReplicaReport:
        with process_group(1):
            rank = dist.get_rank()
            state = {}
            for i in range(0 if rank == 0 else 20):  # rank 0 holds nothing
                value = torch.arange(12.0).view(3, 4).t()  # not contiguous
                if rank == 2:
                    value = value + 1e-6 * (value == 11)
                state[f"model/w{i}"] = ShardedTensor.whole(value)
            return check_replicas(state, dist.group.WORLD)

    reports = run_ranks(4, check)
    assert all(report == reports[0] for report in reports)
    assert (reports[0].compared, reports[0].differing, len(reports[0].mismatches)) == (20, 20, 8)
    assert all(m.ranks == (2,) and m.holders == 3 and "@0,0 [4, 3] float32" in m.name for m in reports[0].mismatches)
    assert "20 of 20 pieces" in str(reports[0]) and "rank 2 of 3" in str(reports[0])


def test_one_process_has_nothing_to_compare() -> None:
    assert check_replicas({}, None) == ReplicaReport(0, 0, ())


@pytest.mark.parametrize(
    ("step", "found_at", "every", "stop"), [(5, 6, 3, False), (4, 4, 100, False), (3, 3, 100, True)],
    ids=["a regular check", "a regular save", "the save of a stop"],
)  # fmt: skip
def test_weights_that_differ_between_replicas_end_the_run_are_named_and_never_saved(
    tmp_path: Path, tiny_data: Path, step: int, found_at: int, every: int, stop: bool
) -> None:
    """Step 4 is the first to be saved."""
    config = config_in(tmp_path, tiny_data, faults={"replica_check_every": every},
                       parallel={"expert_parallel_size": 1})  # fmt: skip

    def flip() -> None:
        def change(engine: Any, result: Any) -> Any:
            if engine.progress().steps == step and os.environ["RANK"] == "1":
                engine.export_state()["model/mmmoe.trunk.norm.weight"].pieces[(0,)][0] += 1e-3
            return result

        on_result(change)

    stops = (partial(signalled, step),) if stop else ()
    with pytest.raises(AssertionError, match=f"step {found_at}: weights that must be equal are not: .*trunk.norm"):
        run_ranks(2, faulty, config, flip, *stops)
    (event,) = events(config, "replica_mismatch")
    assert event["step"] == found_at
    assert set(saved(config)) <= {0, *range(1, step)}  # a save of step 4 may not have been done in time
