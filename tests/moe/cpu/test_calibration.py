"""The choice follows the measured times; no time is measured here: the clock is advanced by the work itself."""

from collections.abc import Callable

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.cpu import blocked, calibration
from mmmoe_pretrain.moe.cpu.calibration import (
    BUDGET,
    SPELLS,
    THREAD_ROWS,
    Calibration,
    Shape,
    calibrate,
    chosen,
    fastest_spells,
    rows_side_by_side,
    time_products,
    time_threads,
)
from mmmoe_pretrain.moe.expert_math import ExpertStack

MOE = MoEConfig(num_experts=4, identity_experts=1, expert_hidden_size=64)


class Clock:
    """Stands still but for the work that is told to take time."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """One call takes the next of ``seconds``."""
        left = iter(seconds)

        def act() -> None:
            self.now += next(left)
            self.done.append(name)

        return act


@pytest.mark.parametrize("onednn, choice", [(0.9, "onednn"), (0.96, "torch"), (1.0, "torch"), (1.2, "torch")])
def test_another_library_must_be_five_percent_faster_than_plain_torch(onednn: float, choice: str) -> None:
    assert chosen({"torch": 1.0, "onednn": onednn}, "torch") == choice


def test_the_fastest_of_alternating_spells_counts_and_the_first_call_does_not() -> None:
    clock = Clock()
    ways = {"a": clock.work("a", 9.0, 3.0, 2.0, 4.0), "b": clock.work("b", 0.5, 1.0, 5.0, 6.0)}
    assert fastest_spells(ways, clock) == {"a": 2.0, "b": 1.0}
    assert "".join(clock.done) == "ab" * (1 + SPELLS)


@pytest.mark.parametrize("slow, torch_seconds, onednn_seconds", [("torch", 3.0, 0.0), ("onednn", 0.0, 3.0)])
def test_products_are_timed_by_library_over_all_three_and_no_size_is_begun_past_the_budget(
    slow: str, torch_seconds: float, onednn_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, shapes = Clock(), []

    def product(*tensors: object) -> None:
        clock.now += float(tensors[-1] == slow)
        shapes.append(tensors[0].shape)

    monkeypatch.setattr(calibration, "matmul", product)
    monkeypatch.setattr(calibration, "matmul_into", product)
    assert BUDGET < 1.0
    assert time_products([Shape(5, 3, 2), Shape(7, 3, 2)], clock) == {
        "torch": torch_seconds,
        "onednn": onednn_seconds,
    }
    assert set(shapes) == {(5, 3), (2, 3)}  # x and its gradient, and the weight's


@pytest.mark.parametrize("better_up_to", [0, *THREAD_ROWS])
def test_experts_run_side_by_side_up_to_the_last_number_of_rows_where_that_is_faster(better_up_to: int) -> None:
    asked = []

    def seconds_at(rows: int) -> dict[str, float]:
        asked.append(rows)
        return {"in turn": 1.0, "side by side": 0.9 if rows <= better_up_to else 0.99}

    assert rows_side_by_side(seconds_at) == better_up_to
    assert asked == list(THREAD_ROWS[: len(asked)]) and asked[-1] >= better_up_to


def test_only_what_is_open_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"torch": 2e-3, "onednn": 1e-3}
    monkeypatch.setattr(calibration, "time_products", lambda shapes, clock: timed)
    monkeypatch.setattr(calibration, "HAS_ONEDNN", True)
    one_thread = calibrate(CpuConfig(), MOE, 32, torch.float32)
    assert one_thread.settings == CpuConfig(products="onednn")
    assert one_thread.lines == [
        "products in fp32: onednn (torch 2.00 ms, onednn 1.00 ms); train.cpu.products sets another"
    ]
    given = CpuConfig(products="torch", rows_for_all_threads=3)
    assert calibrate(given, MOE, 32, torch.float32) == Calibration(given, {})

    monkeypatch.setattr(calibration, "HAS_ONEDNN", False)
    assert calibrate(CpuConfig(), MOE, 32, torch.float32) == Calibration(CpuConfig(products="torch"), {})


def test_products_are_timed_on_one_thread_and_the_process_keeps_its_number(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(calibration, "HAS_ONEDNN", True)
    monkeypatch.setattr(calibration, "time_products", lambda *_: seen.append(torch.get_num_threads()) or {})
    calibrate(CpuConfig(rows_for_all_threads=1), MOE, 32, torch.float32)
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_rows_are_measured_where_there_are_several_threads(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def time_threads(stack: ExpertStack, rows: int, clock: object) -> dict[str, float]:
        seen.append((stack.up_EFD.shape, stack.down_EDF.shape, stack.up_EFD.dtype, stack.cpu_config.products))
        return {"in turn": 1.0, "side by side": 0.5 if rows < 24 else 2.0}

    monkeypatch.setattr(calibration, "time_threads", time_threads)
    moe = MOE.model_copy(update={"expert_hidden_size": 8000, "num_experts": 12})
    found = calibrate(CpuConfig(products="torch"), moe, 4000, torch.bfloat16, expert_size=2)
    assert found.settings == CpuConfig(products="torch", rows_for_all_threads=8)
    # 6 of the 12 experts are on this rank; 4,000 x 16,000 is bounded.
    assert set(seen) == {((6, 1024, 512), (6, 512, 512), torch.bfloat16, "torch")}
    (line,) = found.lines
    assert line.startswith("experts of fewer than 16 rows run side by side on 2 threads; ")


def test_experts_are_timed_one_after_another_on_all_threads_and_side_by_side(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = Clock(), set()

    def run_side_by_side(
        work: Callable[[int], None], rows: list[int], device: torch.device, rows_for_all_threads: int
    ) -> None:
        for index in range(len(rows)):
            work(index)
        spread = rows[0] < rows_for_all_threads * 2  # the rule of threads.py
        seen.add((len(rows), rows[0], spread))
        clock.now += 1.0 if spread else 2.0

    monkeypatch.setattr(blocked, "run_side_by_side", run_side_by_side)
    stack = ExpertStack(torch.ones(5, 8, 4), torch.ones(5, 4, 4), "swiglu")
    assert time_threads(stack, 8, clock) == {"in turn": 2.0, "side by side": 1.0}
    assert seen == {(5, 16, False), (5, 16, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_measured_in_fp32_and_the_router_always(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shape] = []
    monkeypatch.setattr(calibration, "HAS_ONEDNN", True)
    monkeypatch.setattr(calibration, "time_products", lambda shapes, clock: seen.extend(shapes) or {})
    calibrate(CpuConfig(), MOE, 32, dtype, tensor_size=2)
    # Of 64 each tensor rank has 32; SwiGLU's first product has gate and up.
    experts = [Shape(128, 32, 64), Shape(128, 32, 32), Shape(16, 32, 64), Shape(16, 32, 32)]
    assert seen == [*(experts if dtype is torch.float32 else []), Shape(512, 32, 5)]
