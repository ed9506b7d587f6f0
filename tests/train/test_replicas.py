"""Replicas under both engines are equal bit by bit after training; one flipped bit on one rank is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.sharded import Piece, ShardedParameter
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.replicas import ReplicaReport, check_replicas
from tests.distributed import run_ranks
from tests.layouts.cases import LAYOUTS, LEARNING_RATE, MICROBATCHES, VOCAB, Case, global_microbatch


def train_and_check(cases: list[Case], root: Path, flip: int) -> list[list[ReplicaReport]]:
    """Of each case: after two steps, and with a bit flipped on rank ``flip``."""
    with process_group(1) as device:
        return [_train_and_check(case, root, flip, device) for case in cases]


def _train_and_check(case: Case, root: Path, flip: int, device: torch.device) -> list[ReplicaReport]:
    config = case.config(root)
    groups = build_groups(config.parallel, config.moe.group_sizes)
    engine = build_engine(config, VOCAB, groups, device)
    for step in range(2):
        batches = [global_microbatch(config, step * MICROBATCHES + a, groups.data_rank, groups.data_size)
                   for a in range(MICROBATCHES)]  # fmt: skip
        engine.step(batches, LEARNING_RATE)
    world, state = dist.group.WORLD, engine.export_state()
    models = getattr(engine, "models", None) or [engine.model]  # type: ignore[attr-defined]
    models = models if case.zero_stage else []
    reports = [check_replicas(state, world), check_replicas(state, world, models)]
    if dist.get_rank() == flip:
        name = next(name for name in state if name.endswith("router.weight"))
        weight = dict(models[0].named_parameters())[name] if models else state[name].value[0].tensor
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
    cases = [Case(layout, ranks, engine, stage, LAYOUTS[layout][1], precision)
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
    def check() -> str:
        with process_group(1):
            rank = dist.get_rank()
            piece = Piece((4 * rank,), torch.full((4,), float(rank)))
            state = {"weight": ShardedParameter((8,), (piece,), (piece,), (piece,))}
            report = check_replicas(state, dist.group.WORLD)
            assert (report.held, report.compared) == (6, 0)
            return str(report)

    assert run_ranks(2, check) == ["none of 6 pieces is held by two ranks: nothing to compare"] * 2


def test_ranks_without_a_tensor_and_many_differences_are_reported_alike() -> None:
    def check() -> ReplicaReport:
        with process_group(1):
            rank = dist.get_rank()
            state = {}
            for i in range(0 if rank == 0 else 20):  # rank 0 holds nothing
                value = torch.arange(12.0).view(3, 4).t()  # not contiguous
                if rank == 2:
                    value = value + 1e-6 * (value == 11)
                state[f"w{i}"] = ShardedParameter((4, 3), (Piece((0, 0), value),), None, None)
            return check_replicas(state, dist.group.WORLD)

    reports = run_ranks(4, check)
    assert all(report == reports[0] for report in reports)
    assert (reports[0].compared, reports[0].differing, len(reports[0].mismatches)) == (20, 20, 8)
    assert all(m.ranks == (2,) and m.holders == 3 and "@0,0 [4, 3] float32" in m.name for m in reports[0].mismatches)
    assert "20 of 20 pieces" in str(reports[0]) and "rank 2 of 3" in str(reports[0])


def test_one_process_has_nothing_to_compare() -> None:
    assert check_replicas({}, None) == ReplicaReport(0, 0, 0, ())
