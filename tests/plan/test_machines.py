"""The table of machines, files of measured ones, and which links a group's bytes take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan import machines
from mmmoe_pretrain.plan.build import pretended_groups
from mmmoe_pretrain.plan.communication import Transfer
from mmmoe_pretrain.plan.links import on_one_node, placed, strides
from mmmoe_pretrain.plan.machines import GPUS, Collective, Link, find_machine, interpolate, machine_of
from tests.support import tiny_config

# 4 ranks a node; 100 bytes/s and 2 s a message inside, 10 bytes/s and 3 s across.
SLOW = GPUS["h100"].model_copy(
    update={"ranks_per_node": 4, "node": Link(bandwidth=100, latency=2), "network": Link(bandwidth=10, latency=3)}
)
ONE = replace(resolve_layout(tiny_config(Path("unused")), 1), zero_stage=0)


def test_a_measured_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    measured = Collective(kind=ALL_REDUCE, ranks=2, seconds=((4096, 1e-4), (1e6, 1e-3)))
    machine = SLOW.model_copy(update={"name": "ours", "collectives": (measured,), "factors": {"host": 1.25}})
    machines.save(machine, tmp_path / "machine.json")
    assert find_machine(str(tmp_path / "machine.json")) == machine


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not json", "cannot be read as the JSON of a machine"),
        ('{"name": "h100"}', "is not the file of a machine"),
        ("[" * 100_000, "cannot be read as the JSON of a machine"),
        ("[1, 2]", "is not the file of a machine"),
        ('{"mmmoe_machine": 99}', "has version 99, and this is 4"),
        ('{"mmmoe_machine": 4, "name": "x"}', "machine.source: required, and missing"),
    ],
    ids=["no JSON", "foreign", "nested", "a list", "version", "incomplete"],
)
def test_a_bad_file_is_one_line_with_the_remedy(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        find_machine(str(path))
    assert "write it again with mmmoe plan --calibrate" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"streaming": 0}, "machine.streaming: Input should be greater than 0"),
        ({"peak": {"fp32": 0, "bf16": 1, "fp16": 1}}, "machine.peak.fp32: Input should be greater than 0"),
        ({"peak": {"bf16": 1e12}}, "machine.peak has nothing for fp32, fp16"),
        ({"factors": {"experts": -5}}, "machine.factors.experts: Input should be greater than 0"),
        ({"products": dict.fromkeys(("fp32", "bf16", "fp16"), ((512, 1e9), (64, 1e9)))},
         "machine.products.fp32 must have sizes that rise"),
        ({"attention": dict.fromkeys(("fp32", "bf16", "fp16"), ())}, "machine.attention.fp32 must have sizes"),
        ({"collectives": [{"kind": ALL_REDUCE, "ranks": 2, "seconds": [[8, 1e-3], [8, 2e-3], [9, 3e-3]]}]},
         "machine.collectives: all-reduce of 2 ranks must have sizes that rise"),
        ({"crowded": {"experts": [[4, 1.5], [2, 1.2]]}},
         "machine.crowded.experts must have numbers of ranks that rise"),
        ({"crowded": {"experts": [[2, 0.5]]}}, "machine.crowded.experts must have times of 1 or more"),
        ({"crowded": {"expert": [[2, 1.5]]}}, "machine.crowded.'expert' is not a part of a step; parts are "),
        ({"factors": {"host time": 2}}, "machine.factors.'host time' is not a part of a step; parts are products, "),
        ({"collectives": [{"kind": "all-sum", "ranks": 2, "seconds": [[8, 1e-3]]}]},
         "machine.collectives: 'all-sum' is not a collective; they are all-reduce, "),
        ({"streaming": 1e-308}, "machine.streaming must be from 1e-30 to 1e+30 (got 1e-308)"),
        ({"crowded": {"experts": [[2, 1e308]]}}, "machine.crowded.experts must be from 1e-30 to 1e+30 (got 1e+308)"),
        ({"cores": 10**400}, "machine.cores must be from 1e-30 to 1e+30 (got 1000"),
    ],
)  # fmt: skip
def test_rates_that_plans_cannot_read_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "machine.json"
    machines.save(SLOW, path)
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | change), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(problem)):
        find_machine(str(path))


def test_what_is_not_known_is_named_beside_what_is() -> None:
    with pytest.raises(ValueError, match="'h900' is not a known machine; use one of h100, h200, b200"):
        find_machine("h900")
    with pytest.raises(ValueError, match="'carrier-pigeon' is not known; use one of infiniband-200"):
        find_machine("h100", network="carrier-pigeon")
    with pytest.raises(ValueError, match="--gpus-per-node 0 must be 1 or more"):
        find_machine("h100", ranks_per_node=0)
    given = find_machine("H100", ranks_per_node=4, network="25,5")
    assert given.ranks_per_node == 4
    assert (given.network.bandwidth, given.network.latency) == pytest.approx((25e9, 5e-6))


def test_a_gpu_is_known_by_the_name_that_its_driver_gives() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40gb",
             "NVIDIA GB200": "gb200",
             "NVIDIA B200": "b200", "AMD Instinct MI300X": "mi300x"}  # fmt: skip
    assert {name: found.name for name in names if (found := machine_of(name))} == names
    for other in ("NVIDIA GeForce RTX 4090", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA A100X"):
        assert machine_of(other) is None, other


def test_rates_between_measured_sizes_are_straight_lines_in_logarithms() -> None:
    curve = ((64.0, 10.0), (256.0, 40.0), (1024.0, 90.0))
    assert interpolate(curve, 128) == pytest.approx(20)  # halfway from 64 to 256 in logarithms: sqrt(10 x 40)
    assert interpolate(curve, 256) == pytest.approx(40)
    assert interpolate(curve, 16) == pytest.approx(2.5)  # in proportion below
    assert interpolate(curve, 1e6) == 90


def test_groups_lie_where_the_mesh_puts_them() -> None:
    """16 ranks: TP2 x EP2 x EDP2 x PP2, against the groups that megatron-core makes."""
    config = tiny_config(
        Path("unused"),
        parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2},
        train={"global_batch_size": 16},
    )
    layout = resolve_layout(config, 16)
    with pretended_groups(layout) as groups:
        made = {
            plan.TENSOR: groups.tensor, plan.EXPERT: groups.expert, plan.EXPERT_DATA: groups.expert_data,
            plan.DATA: groups.data, plan.PIPELINE: groups.pipeline,
        }  # fmt: skip
        ranks = {name: dist.get_process_group_ranks(group) for name, group in made.items()}
    for name, (stride, size) in strides(layout).items():
        if name in ranks:
            assert ranks[name] == [stride * i for i in range(size)], name
            for of_node in (1, 2, 4, 8, 16):
                near = sum(rank < of_node for rank in ranks[name])
                assert on_one_node(stride, size, of_node) == near, (name, of_node)


@pytest.mark.parametrize(
    ("kind", "inside", "across", "seconds"),
    [
        # 8 ranks on two nodes of 4. A ring crosses on one of four links: 600 and 200 bytes, 20 s on the slower;
        # 3 hops of 2 s and one of 3 s.
        (ALL_GATHER, 600, 200, 3 * 2 + 1 * 3 + 20),
        # trees: there and back log2(4) = 2 hops inside, 1 across
        (ALL_REDUCE, 600, 200, 2 * (2 * 2 + 1 * 3) + 20),
        # 3 of 7 peers are near; one message across
        (ALL_TO_ALL, 800 * 3 / 7, 800 * 4 / 7, 3 + 800 * 4 / 7 / 10),
    ],
)
def test_bytes_split_into_inside_and_across(kind: str, inside: float, across: float, seconds: float) -> None:
    layout = replace(ONE, world_size=8, data=8, expert_data=8)
    found = placed(Transfer("x", kind, plan.DATA, 8, 1, 800.0), layout, SLOW)
    assert (found.inside, found.across, found.seconds) == pytest.approx((inside, across, seconds))


def test_pipeline_stages_on_one_node_send_inside_it() -> None:
    near = replace(ONE, world_size=4, pipeline=4)
    far = replace(ONE, world_size=32, data=8, expert_data=8, pipeline=4)
    message = Transfer("hidden states", POINT_TO_POINT, plan.PIPELINE, 4, 2, 300.0)
    assert placed(message, near, SLOW).seconds == pytest.approx(2 * 2 + 3)
    assert placed(message, far, SLOW, times=3).seconds == pytest.approx(3 * (2 * 3 + 30))
    assert placed(message, far, SLOW).across == 300


def test_a_measured_collective_comes_before_the_links() -> None:
    """Of 2 ranks: 1 s for 10 bytes, 4 s for 40. A ring of 3 ranks takes two steps, of half its bytes each."""
    measured = Collective(kind=ALL_REDUCE, ranks=2, seconds=((10, 1), (40, 4)))
    machine = SLOW.model_copy(update={"collectives": (measured,)})
    layout = replace(ONE, world_size=3, data=3, expert_data=3)

    def seconds(kind: str, sent: float, calls: int) -> float:
        return placed(Transfer("x", kind, plan.DATA, 3, calls, sent), layout, machine).seconds

    for kind in (ALL_REDUCE, ALL_GATHER):  # a ring of the same bytes
        assert seconds(kind, 80, 2) == pytest.approx(2 * 2 * 2)  # two calls of two steps of 20 bytes
        assert seconds(kind, 8, 2) == pytest.approx(2 * 2 * 1)  # no call is shorter than that of the least message
        assert seconds(kind, 200, 1) == pytest.approx(2 * 10)  # in proportion above the largest
