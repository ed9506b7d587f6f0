"""The groups of ranks in each layout, and that every group works."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups, host_pipeline
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import tiny_config

RANKS = 8
NUM_EXPERTS = 4
KINDS = ("data", "expert", "expert_data", "tensor", "pipeline")
AXES = ("pipeline", "expert_data", "expert", "tensor")  # the last one is counted fastest
# The section ``parallel``, and the sizes of the axes.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "EP4 x EDP2": ({}, (1, 2, 4, 1)),
    "TP2 x EP2 x EDP2, sequence-parallel": (
        {"tensor_parallel_size": 2, "expert_parallel_size": 2, "sequence_parallel": True}, (1, 2, 2, 2)),
    "TP2 x PP2 x EP2": (
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2}, (2, 1, 2, 2)),
    "PP4 x VPP2 x DP2": (
        {"pipeline_parallel_size": 4, "virtual_pipeline_size": 2, "expert_parallel_size": 1}, (4, 2, 1, 1)),
    "TP4 x PP2": ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, (2, 1, 1, 4)),
}  # fmt: skip


def group_of(rank: int, kind: str, sizes: tuple[int, ...]) -> list[int]:
    """The ranks that differ from ``rank`` along the axes of ``kind`` alone."""
    grid = np.arange(RANKS).reshape(sizes)
    place = np.argwhere(grid == rank)[0]
    free = ("expert_data", "expert") if kind == "data" else (kind,)
    return sorted(grid[tuple(slice(None) if axis in free else i for axis, i in zip(AXES, place, strict=True))].flat)


def ranks_met(group: dist.ProcessGroup | None) -> list[int]:
    """The global ranks that a gather over ``group`` brings together: the group works, and is no other."""
    assert group is not None  # torch would take the whole world
    mine = torch.tensor([dist.get_rank()])
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [int(rank) for rank in found]


def look_around() -> dict[str, tuple[dict[str, list[int]], dict[str, Any]]]:
    """On every rank, each case's groups and the numbers that ``Groups`` says."""
    seen = {}
    with process_group(timeout_minutes=0.5):
        for name, (parallel, _) in CASES.items():
            groups = groups_of(ParallelConfig.model_validate(parallel), NUM_EXPERTS)
            met = {kind: ranks_met(getattr(groups, kind)) for kind in KINDS}
            pipeline = host_pipeline(groups, build_host_groups(timeout_minutes=0.5).control, timeout_minutes=0.5)
            assert (pipeline is None) == (groups.pipeline_size == 1)
            assert pipeline is None or ranks_met(pipeline) == met["pipeline"]
            numbers = {field: value for field, value in vars(groups).items() if isinstance(value, int)}
            seen[name] = (met, numbers)
            destroy_groups()
        with pytest.raises(ValueError, match=r"tensor_parallel_size 3 .* the 8 that run"):
            groups_of(ParallelConfig(tensor_parallel_size=3), NUM_EXPERTS)
    return seen


def threads_and_descriptors() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def build_and_destroy() -> tuple[list[tuple[int, int]], list[bool]]:
    """Threads and descriptors of a process behind each of three rounds; does each host group reach all ranks?"""
    counts, works = [], []
    with process_group(timeout_minutes=0.5):
        for _ in range(3):
            host = build_host_groups(timeout_minutes=0.5)
            groups = groups_of(ParallelConfig(tensor_parallel_size=2), NUM_EXPERTS)
            works += [ranks_met(group) == [0, 1, 2, 3] for group in (host.control, host.storage, groups.tensor)]
            del host, groups
            destroy_groups()
            counts.append(threads_and_descriptors())
    return counts, works


def test_destroyed_groups_leave_no_threads_and_connections() -> None:
    for counts, works in run_ranks(4, build_and_destroy):
        assert works == [True, True, False] * 3  # tensor ranks are two
        # Closing lags a little; what leaked before was 60 threads and 100 descriptors a round.
        assert counts[2][0] <= counts[0][0] + 2, counts
        assert counts[2][1] <= counts[0][1] + 10, counts


def limits_and_spare_groups() -> tuple[int, int, bool]:
    """The limits of open files in a job that began with 256, and whether megatron-core made gloo groups, too."""
    from megatron.core import parallel_state

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with process_group(timeout_minutes=0.5):
        groups_of(ParallelConfig(), NUM_EXPERTS)
        try:
            spare = parallel_state.get_data_parallel_group_gloo() is not None
        except AssertionError:
            spare = False
        destroy_groups()
    return *resource.getrlimit(resource.RLIMIT_NOFILE), spare


def test_many_ranks_do_not_exhaust_the_open_files() -> None:
    ((soft, hard, spare),) = run_ranks(1, limits_and_spare_groups)
    assert soft == hard > 256 and not spare


def test_one_process_has_no_host_groups() -> None:
    with process_group(timeout_minutes=0.5):
        assert build_host_groups(timeout_minutes=0.5) == HostGroups(None, None)


def test_groups_hold_the_ranks_that_the_layout_says() -> None:
    assert group_of(5, "data", (2, 1, 2, 2)) == [5, 7] and group_of(5, "pipeline", (2, 1, 2, 2)) == [1, 5]  # by hand
    for rank, seen in enumerate(run_ranks(RANKS, look_around)):
        for name, (parallel, sizes) in CASES.items():
            met, numbers = seen[name]
            mine = {kind: group_of(rank, kind, sizes) for kind in KINDS}
            assert met == mine, (name, rank)
            for kind in ("data", "expert", "tensor", "pipeline"):
                place = (mine[kind].index(rank), len(mine[kind]))
                assert (numbers[f"{kind}_rank"], numbers[f"{kind}_size"]) == place, (name, rank, kind)
            assert numbers["virtual_size"] == parallel.get("virtual_pipeline_size", 1)
            assert numbers["sequence_parallel"] == parallel.get("sequence_parallel", False)


def test_experts_are_cut_into_runs_by_expert_rank() -> None:
    groups = Groups(data_size=4, data_rank=3, expert_size=2, expert_rank=1)
    assert groups.local_experts(8) == range(4, 8)


def test_an_error_before_the_groups_are_built_is_the_only_line(tmp_path: Path) -> None:
    """megatron-core warns, at its import, of all the packages that it does without."""
    run_config.dump(tiny_config(tmp_path), tmp_path / "run.yaml")  # there is no tokenizer
    command = [sys.executable, "-m", "mmmoe_pretrain.cli", "train", str(tmp_path / "run.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"mmmoe: no tokenizer at {tmp_path / 'tokens.model'}; give data.tokenizer=FILE, or make one by mmmoe-data "
        f"tokenizer"
    ]
