"""The benchmark of the dispatchers counts what leaves a rank, and bounds it from below."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.dispatch import Row, summary
from benchmarks.dispatching.contenders import DEEPSPEED, MEGATRON, OURS
from benchmarks.dispatching.traffic import Traffic, least_bytes
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks


def test_the_bound_is_a_row_there_and_back_for_each_other_rank_of_a_token() -> None:
    # Two ranks of two experts. From rank 0, tokens 1 (for two experts) and 2 must leave: 2 rows, 4 trips each.
    expert_ids = torch.tensor([[0, 1], [2, 3], [0, 2]])
    assert least_bytes(expert_ids, experts=4, rank=0, ranks=2, row_bytes=10) == 2 * 4 * 10
    assert least_bytes(expert_ids, experts=4, rank=1, ranks=2, row_bytes=10) == 2 * 4 * 10  # tokens 0 and 2
    assert least_bytes(expert_ids[:1], experts=4, rank=0, ranks=2, row_bytes=10) == 0


def traffic_of_collectives() -> list[float]:
    with process_group(timeout_minutes=0.5):
        rank, found = dist.get_rank(), []
        receive = [1 + rank, 1 + rank]  # of each: one row for rank 0 and two for rank 1
        for collective in (
            lambda: dist.all_to_all_single(torch.empty(sum(receive), 4), torch.ones(3, 4), receive, [1, 2]),
            lambda: dist.all_to_all_single(torch.empty(6, 4), torch.ones(6, 4)),
            lambda: dist.all_reduce(torch.ones(5)),
        ):
            with Traffic(rank, ranks=2) as traffic:
                collective()
            found.append(traffic.sent)
        with pytest.raises(NotImplementedError, match="broadcast"), Traffic(rank, ranks=2):
            dist.broadcast(torch.ones(1), src=0)
        dist.barrier()
    return found


def test_only_what_leaves_a_rank_counts_and_an_unknown_collective_is_refused() -> None:
    row = 4 * 4
    assert run_ranks(2, traffic_of_collectives) == [[2 * row, 3 * row, 20], [1 * row, 3 * row, 20]]


def test_the_summary_is_of_geometric_means_and_names_who_is_faster() -> None:
    points = [
        {OURS: Row(20, 10, 1.0), MEGATRON: Row(40, 10, 4.0)},
        {OURS: Row(80, 10, 2.0), MEGATRON: Row(40, 10, 2.0)},
    ]
    assert summary(points) == {"bytes_vs_bound": 4.0, "bytes_vs_megatron": 1.0, "time_vs_megatron": 2.0}
    with_deepspeed = [{**point, DEEPSPEED: Row(160, 10, 4.0)} for point in points]
    assert summary(with_deepspeed)["bytes_vs_deepspeed"] == 0.25  # sqrt(20 80) / 160
