"""The plan of a run, made beside it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.plan import machines
from mmmoe_pretrain.train.planned import Comparison, PlanInBackground, Planned, arguments, check_machine
from tests.support import tiny_config

VALUES = {
    "gpus": 64, "gpu": "h100", "limit": "time: experts, 22% of a step",
    "memory": {"total": 50e9, "capacity": 80e9, "terms": {"moments": 30e9, "activations": 12e9, "allowance": 8e9}},
    "step": {"seconds": 4.0, "tokens": 8000.0, "tokens_per_second": 2000.0, "mfu": 0.25},
}  # fmt: skip


def answer(command: list[str], steps_left: int = 21_600) -> Planned | None:
    plan, deadline, found = PlanInBackground(command), time.monotonic() + 30.0, None
    try:
        while plan._process is not None and time.monotonic() < deadline:
            found = plan.poll(steps_left) or found
            time.sleep(0.01)
        return found
    finally:
        plan.close()


def test_three_lines_and_what_was_measured_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = (
        f"import os; assert 'WORLD_SIZE' not in os.environ, 'of the job'; print({json.dumps(json.dumps(VALUES))})"
    )
    found = answer([sys.executable, "-c", script])
    assert found is not None
    assert found.lines == (
        "planned on 64 x h100: 50.0 of 80 GB on the fullest, most in optimizer moments",
        "planned: 4 s a step of 8,000 tokens, 2,000 tok/s, MFU 25.0%; time: experts, 22% of a step",
        "planned: 1.0 days for the 21,600 steps that are left",
    )
    assert found.beside([1500.0, 1000.0, 9000.0], {"allocated": 21e9, "reserved": 30e9}) == (
        "measured: tok/s 0.75 of the plan (median of 3 records), peak memory 0.50 of it"
    )
    assert found.beside([1500.0], {"resident": 1e9}) == "measured: tok/s 0.75 of the plan (one record)"
    assert found.beside([1500.0], {"resident": 30e9, "grown": 21e9}) == (
        "measured: tok/s 0.75 of the plan (one record), peak memory 0.50 of it (the process grew by 21.00 GB since "
        "before the model was built)"
    )


class Ready:
    """A plan that is ready at the poll of this number, or fails there."""

    def __init__(self, at: int, fails: bool = False) -> None:
        self._left, self._fails, self.running = at, fails, True

    def poll(self, steps_left: int) -> Planned | None:
        self._left -= 1
        self.running = self._left > 0
        return None if self.running or self._fails else Planned.of(VALUES, steps_left)

    def close(self) -> None:
        self.running = False


def told(plan: Ready | None, records: list[float]) -> list[list[str]]:
    """What is told after each record, and at the end."""
    comparison: Any = Comparison(plan)  # type: ignore[arg-type]
    left = range(len(records) - 1, -1, -1)
    return [*(comparison.add(n, speed, {}) for n, speed in zip(left, records, strict=True)), comparison.close()]


def test_the_median_of_the_five_records_after_the_plan_is_compared() -> None:
    slow = [10.0, 10.0, 10.0]  # before the plan is ready, and with it
    found = told(Ready(3), [*slow, 1000.0, 1000.0, 1500.0, 9000.0, 9000.0, 1.0])
    assert [len(lines) for lines in found] == [0, 0, 3, 0, 0, 0, 0, 1, 0, 0]
    assert found[7] == ["measured: tok/s 0.75 of the plan (median of 5 records)"]


def test_the_end_of_a_run_tells_what_was_not_told() -> None:
    found = told(Ready(1), [1000.0, 2000.0, 1500.0])
    assert [len(lines) for lines in found] == [3, 0, 0, 1]
    assert found[3] == ["measured: tok/s 0.75 of the plan (median of 3 records)"]
    late = told(Ready(2), [1000.0])[-1]
    assert [line.partition(" ")[0] for line in late] == ["planned", "planned:", "measured:"], "no steps are left"
    assert told(Ready(9), [1000.0])[-1] == ["no plan of this run is shown: the run ended before its plan was ready"]
    assert told(Ready(1, fails=True), [1000.0])[-1] == told(None, [1000.0])[-1] == []


def test_a_plan_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    script = "import sys; print('mmmoe: the layout needs 8 ranks\\n', file=sys.stderr); raise SystemExit(2)"
    assert answer([sys.executable, "-c", "print('INFO', file=__import__('sys').stderr);" + script]) is None
    assert "mmmoe plan ended with 2: the layout needs 8 ranks" in caplog.text
    assert answer([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert "mmmoe plan ended with 3: no message" in caplog.text


def test_a_machine_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"mmmoe_machine": 2, "name"')
    for name, message in (
        ("gone.json", r"train.machine: .*gone.json' is not a known machine; use one of h100, .* mmmoe plan --calib"),
        ("half.json", r"train.machine: .*half.json cannot be read as the JSON of a machine .* write it again"),
    ):
        with pytest.raises(ValueError, match=message):
            check_machine(tiny_config(tmp_path, train={"machine": str(tmp_path / name)}))
    machines.save(machines.GPUS["cpu"], tmp_path / "whole.json")
    check_machine(tiny_config(tmp_path, train={"machine": str(tmp_path / "whole.json")}))


def test_a_plan_that_cannot_start_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # which has no ``nice``
    assert PlanInBackground.of(["--help"]) is None
    assert "mmmoe plan cannot start: " in caplog.text


def test_a_run_on_an_unknown_machine_has_no_plan(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert arguments(config, 2, None) is None
    told = str(config.run_dir / "config.yaml")
    assert arguments(config, 2, "h100") == [told, "--gpus", "2", "--gpu", "h100", "--json"]
    measured = tiny_config(tmp_path, train={"machine": "machine.json"})
    assert arguments(measured, 2, "h100") == [told, "--gpus", "2", "--machine", "machine.json", "--json"]


@pytest.mark.slow
def test_the_real_plan_of_a_run(tmp_path: Path) -> None:
    from mmmoe_pretrain import config as run_config

    machines.save(machines.GPUS["cpu"], tmp_path / "machine.json")
    config = tiny_config(tmp_path, train={"machine": str(tmp_path / "machine.json")})
    config.run_dir.mkdir(parents=True)
    run_config.dump(config, config.run_dir / "config.yaml")
    told = arguments(config, 2, None)
    assert told is not None
    plan, deadline, found = PlanInBackground.of(told), time.monotonic() + 100.0, None
    assert plan is not None
    while found is None and time.monotonic() < deadline:
        found = plan.poll(10)
        time.sleep(0.1)
    plan.close()
    assert found is not None and found.tokens_per_second > 0 and found.peak_memory > 0
