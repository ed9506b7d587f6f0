"""The benchmark of the dispatchers bounds from below what leaves a rank."""

import numpy as np
import pytest
import torch

from benchmarks.dispatch import Row, summary
from benchmarks.dispatching.contenders import DEEPSPEED, MEGATRON, OURS
from benchmarks.dispatching.lending import Lent, measure_lending, routings, summary_of_lending
from benchmarks.dispatching.traffic import least_bytes
from tests.distributed import run_ranks


def test_the_bound_is_a_row_there_and_back_for_each_other_rank_of_a_token() -> None:
    # Two ranks of two experts. From rank 0, tokens 1 (for two experts) and 2 must leave: 2 rows, 4 trips each.
    expert_ids = torch.tensor([[0, 1], [2, 3], [0, 2]])
    assert least_bytes(expert_ids, experts=4, rank=0, ranks=2, row_bytes=10) == 2 * 4 * 10
    assert least_bytes(expert_ids, experts=4, rank=1, ranks=2, row_bytes=10) == 2 * 4 * 10  # tokens 0 and 2
    assert least_bytes(expert_ids[:1], experts=4, rank=0, ranks=2, row_bytes=10) == 0


def test_the_summary_is_of_geometric_means_and_names_who_is_faster() -> None:
    points = [
        {OURS: Row(20, 10, 1.0), MEGATRON: Row(40, 10, 4.0)},
        {OURS: Row(80, 10, 2.0), MEGATRON: Row(40, 10, 2.0)},
    ]
    assert summary(points) == {"bytes_vs_bound": 4.0, "bytes_vs_megatron": 1.0, "time_vs_megatron": 2.0}
    with_deepspeed = [{**point, DEEPSPEED: Row(160, 10, 4.0)} for point in points]
    assert summary(with_deepspeed)["bytes_vs_deepspeed"] == 0.25  # sqrt(20 80) / 160


def test_lending_levels_the_rows_of_the_recorded_routing() -> None:
    first, other = run_ranks(2, measure_lending, 1)
    assert first.keys() == other.keys() == {"recorded layer 1", "recorded layer 3", "Zipf"}
    for name, ids in routings().items():
        loads = np.bincount(ids[:2].ravel(), minlength=16).reshape(2, 8).sum(1)
        (before, after), lent = first[name].imbalance, first[name].experts
        assert before == pytest.approx(loads.max() / loads.mean())
        assert after == pytest.approx(1.0, abs=1e-3) if before > 1.25 else (after, lent) == (before, 0)
        assert first[name].bytes == 2 * lent * 3 * 128 * 512 * 4  # there and back, of three matrices in fp32
    assert first["recorded layer 3"].experts > 0


def test_the_summary_of_lending_is_of_all_recorded_points() -> None:
    points = [Lent((2.0, 1.0), (1, 1), (1, 1), 1, 30), Lent((8.0, 4.0), (1, 1), (1, 1), 2, 50)]
    assert summary_of_lending(points) == {"imbalance_before": 4.0, "imbalance_after": 2.0, "lent_bytes": 80}
