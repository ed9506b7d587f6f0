"""Calibration on gloo ranks: it ends, on one rank and on several, and its file plans a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT, REDUCE_SCATTER
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan import calibrate as calibration
from mmmoe_pretrain.plan import host_time, machines
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.machines import Host, Machine, find_machine
from mmmoe_pretrain.plan.time import step_time
from tests.distributed import run_ranks
from tests.support import tiny_config

DENSE = {"num_experts": 1, "experts_per_token": 1}


def measured(config: RunConfig, file: Path = Path("unused/here.json")) -> Machine:
    calibration.SIZES, calibration.EXPERT_ROWS, calibration.LENGTHS = (32, 64), (32,), (16,)  # of this fork
    host_time.STEPS, host_time.BLOCKS, host_time.MICROBATCHES = 1, (1, 3), (1, 2)
    calibration.SPELL, calibration.MESSAGES = 1e-4, (64, 1024)
    calibration.SPELLS_OF_LINKS, calibration.MOST_CALLS, calibration.BETWEEN = 2, 2, 4
    calibration.STREAMED, calibration.OPTIMIZED = 1 << 20, 1 << 18
    with process_group(timeout_minutes=0.5) as device:
        return calibration.calibrate_ranks(config, device, file)


def config() -> RunConfig:
    return tiny_config(Path("unused"), moe={"num_experts": 4, "expert_hidden_size": 8})


@pytest.mark.filterwarnings("ignore")
def test_a_calibrated_machine_plans_a_step(tmp_path: Path) -> None:
    ranks = run_ranks(2, measured, config())
    kinds = {ALL_REDUCE, ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER, POINT_TO_POINT}
    for machine in ranks:
        assert {(one.kind, one.ranks) for one in machine.collectives} == {(kind, 2) for kind in kinds}
        assert all([sent for sent, _ in one.seconds] in ([128, 2048], [256, 4096]) for one in machine.collectives)
    machines.save(ranks[0], tmp_path / "here.json")
    machine = find_machine(str(tmp_path / "here.json"))
    assert machine == ranks[0] and machine.name == "here"
    assert machine.cores and not machine.asynchronous
    assert {ranks for curve in machine.crowded.values() for ranks, _ in curve} == {2}
    assert {"products", "experts", "attention", "memory bound", "optimizer", "host"} <= set(machine.crowded)
    assert [size for size, _ in machine.products["fp32"]] == [32, 64]
    assert machine.peak["fp32"] == max(
        rate for curve in (machine.products, machine.grouped) for _, rate in curve["fp32"]
    )
    step = step_time(build(config(), 2), machine)
    assert 0 < step.mfu < 1 and step.parts["gradients"] > 0


@pytest.mark.filterwarnings("ignore")
def test_ranks_are_added_to_the_file_of_one_process(tmp_path: Path) -> None:
    """Whose rates and host's times stay; that of another version is written anew."""
    file = tmp_path / "here.json"
    [alone] = run_ranks(1, measured, config(), file)
    machines.save(alone, file)
    both = run_ranks(2, measured, config(), file)[0]
    kept = ("name", "products", "grouped", "attention", "streaming", "optimizer_bytes")
    assert all(getattr(both, key) == getattr(alone, key) for key in kept)
    assert both.host.model_dump(exclude={"dispatch"}) == alone.host.model_dump(exclude={"dispatch"})
    assert not alone.collectives and {one.ranks for one in both.collectives} == {2}
    file.write_text(file.read_text().replace('"mmmoe_machine": 4', '"mmmoe_machine": 3'))
    dense = tiny_config(Path("unused"), moe=DENSE)  # which takes less time
    assert run_ranks(2, measured, dense, file)[0].products != alone.products


@pytest.mark.filterwarnings("ignore")
def test_the_file_of_a_dense_model_plans_a_step(tmp_path: Path) -> None:
    """Whose training is profiled, on a rank that calibration does not have."""
    moe, train = DENSE, {"profile": {"steps": [2, 3], "ranks": [1]}}
    dense = tiny_config(Path("unused"), moe=moe)
    profiled = tiny_config(Path("unused"), moe=moe, train=train)
    machines.save(run_ranks(1, measured, profiled)[0], tmp_path / "dense.json")
    machine = find_machine(str(tmp_path / "dense.json"))
    assert not machine.grouped and step_time(build(dense, 1), machine).seconds > 0


@pytest.mark.filterwarnings("ignore")
def test_what_the_host_takes_beside_others_becomes_what_it_takes_alone() -> None:
    """On two ranks, each of which takes 1.5 times as long."""
    host = Host(dense_block=3, moe_block=6, microbatch=9, step_block=12, step=15)

    def calibrated() -> Host:
        calibration.MESSAGES, calibration.SPELLS_OF_LINKS = (64,), 2
        calibration.calibrate = lambda *_, **__: machines.GPUS["cpu"].model_copy(update={"host": host})
        calibration._crowded = lambda *_: {"host": ((2.0, 1.5),)}
        with process_group(timeout_minutes=0.5) as device:
            return calibration.calibrate_ranks(
                tiny_config(Path("unused"), moe=DENSE), device, Path("unused/here.json")
            ).host

    assert run_ranks(2, calibrated)[0] == Host(dense_block=2, moe_block=4, microbatch=6, step_block=8, step=10)


@pytest.mark.parametrize(("world", "here", "node"), [(2, 2, 8), (12, 12, 12), (12, 4, 4)])
def test_a_node_has_the_ranks_of_the_job_on_it(
    world: int, here: int, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert calibration._known(torch.device("cpu")).ranks_per_node == node


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_do_not_divide_the_messages_get_equal_shares() -> None:
    """Of 64 and 1,024 numbers 66 and 1,026, of which two thirds leave a rank."""
    machine = run_ranks(3, measured, config())[0]
    found = {one.kind: [sent for sent, _ in one.seconds] for one in machine.collectives if one.ranks == 3}
    assert set(found) == {ALL_REDUCE, ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER}
    assert found[ALL_TO_ALL] == found[ALL_GATHER] == pytest.approx([4 * 66 * 2 / 3, 4 * 1026 * 2 / 3])


@pytest.mark.filterwarnings("ignore")
def test_links_need_ranks() -> None:
    def alone() -> str:
        with process_group(timeout_minutes=0.5) as device, pytest.raises(ValueError, match="start several") as error:
            calibration.add_links(machines.GPUS["cpu"], config(), device)
        return str(error.value)

    assert "torchrun" in run_ranks(1, alone)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("after_products", "expected"), [(3, 3), (0.5, (0.5 + 7) / 8)])
def test_a_call_takes_what_it_adds_to_products_and_at_least_its_time_in_a_row(
    after_products: float, expected: float
) -> None:
    """Products of 5 s, after which a call takes 3 s or half a second, and after another call 1 s. Of eight calls in a
    row only the first comes after products. In a quarter of the spells of both one call hangs for 100 s."""
    assert calibration.MOST_CALLS == 8

    def measured() -> float:
        now, calls, after = [0.0], [0], [False]

        def products() -> None:
            now[0] += 5
            after[0] = True

        def work(numbers: int) -> None:
            calls[0] += after[0]
            now[0] += after_products if after[0] else 1
            now[0] += 100 * (after[0] and calls[0] % (4 * calibration.MOST_CALLS) == 0)
            after[0] = False

        with process_group(timeout_minutes=0.5):
            return calibration._seconds_of_link(work, 64, products, lambda: now[0])

    assert run_ranks(1, measured) == [pytest.approx(expected)]


def test_the_middle_half_counts() -> None:
    assert calibration.middle([100, 1, 3, 2]) == 2.5
    assert calibration.middle([7]) == 7
