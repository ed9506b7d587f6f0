"""Runs of the studies in small: trained, continued after signals and kills, recorded once. They are forks, as --quick
makes them; processes of their own are tested without training."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import pytest

from evidence import __main__ as command
from evidence import quick, records
from evidence.methods import study
from evidence.runs import START, Call, Cost, Runner, Task
from evidence.settings import changed
from evidence.study import Variant
from tests import distributed as _imports  # noqa: F401 - what runs import, once and not in each fork

pytestmark = pytest.mark.timeout(300)  # seconds on two idle cores; many imports, so minutes on busy ones
ONE = ("--quick", "--only", "prose", "--variants", "e4", "--seeds", "1")
RUN, RECORD = "runs/prose-e4-seed1", "records/prose/e4-seed1.json"
STEPS = 100  # of runs that are stopped on their way


def events(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / RUN / "events.jsonl").read_text().splitlines()]


def cost(out: Path) -> dict:
    return json.loads((out / RUN / "core_seconds.json").read_text())


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def harness(out: Path, steps: int = STEPS) -> Iterator[BaseProcess]:
    """``python -m evidence --quick`` of one run, in a fork."""

    def call() -> None:
        own = (f"train.steps={steps}", f"checkpoint.every={steps}", f"evaluate.every={steps}")
        quick.SIZES = (*quick.SIZES, *own)
        command.main([*ONE, "--out", str(out)])

    fork = multiprocessing.get_context("fork").Process(target=call)
    fork.start()
    try:
        yield fork
    finally:
        fork.kill()
        fork.join()


def is_training(out: Path) -> bool:
    path = out / RUN / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def test_a_study_is_trained_recorded_and_shown(out: Path, capsys: pytest.CaptureFixture) -> None:
    command.main(["--quick", "--only", "captions", "--variants", "dense", "e4", "--jobs", "2", "--out", str(out)])
    found = records.read_study(study("captions"), out / "records")
    assert {name: sorted(by_seed) for name, by_seed in found.items()} == {"dense": [1, 2], "e4": [1, 2]}
    dense, four = found["dense"][1], found["e4"][1]
    assert dense.steps == [2, 4, 6]
    assert [point.tokens for point in dense.points] == [point.tokens for point in four.points]  # the same samples
    assert (dense.config["moe"]["num_experts"], four.config["moe"]["num_experts"]) == (1, 4)
    # Each of 2 layers has 3 more experts of three matrices of 32 by 16, and a router of 4 rows of 32,
    # which one expert lacks.
    assert four.parameters - dense.parameters == 2 * (3 * 3 * 32 * 16 + 4 * 32)
    assert four.active_parameters - dense.active_parameters == 2 * 4 * 32
    assert 0 < (dense.core_seconds or 0) < 60
    text = (out / "evidence.md").read_text()
    assert "Evidence in small" in text
    assert "4 experts" in text
    assert (out / "evidence" / "captions.svg").is_file()
    before = {path: path.stat().st_mtime_ns for path in (out / "records").rglob("*.json")}
    capsys.readouterr()
    command.main(["--quick", "--only", "captions", "--variants", "dense", "e4", "--out", str(out)])
    assert "0 runs to train of 4" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "records").rglob("*.json")} == before


def test_a_run_of_the_demo_is_trained_and_evaluated(out: Path) -> None:
    command.main(["--quick", "--only", "demo", "--variants", "moe", "--seeds", "1", "--out", str(out)])
    (path,) = (out / "records").rglob("*.json")
    found = records.read(path)
    wanted = {metric.name for metric in study("demo").metrics}
    assert wanted <= found.last.scores.keys() and "captions_perplexity" in found.last.scores
    assert not any(name.startswith("test/") for point in found.points[:-1] for name in point.scores)
    report = json.loads((out / "runs/demo-moe-seed1/report.json").read_text())
    (row,) = (row for row in report["results"] if row["metric"] == "captions_perplexity")
    assert found.last.scores["test/captions_perplexity"] == row["value"] > 1
    table = (out / "evidence.md").read_text()
    assert f"| perplexity of captions | {row['value']:.1f} |\n| change | - |" in table  # a row a metric


def test_a_command_that_a_signal_ends_is_repeated_and_its_time_does_not_count(tmp_path: Path) -> None:
    class Busy(Runner):
        def _start(self, call: Call, log: BinaryIO) -> int:
            process = subprocess.Popen(["sh", "-c", "while :; do :; done"])
            process.returncode = 0  # os.wait4 waits for it
            return process.pid

    (tmp_path / "events.jsonl").touch()
    path, runner = tmp_path / "core_seconds.json", Busy(1, tmp_path)
    path.write_text('{"seconds": 5.0, "running": false}')
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(runner._ended, Call("", (), tmp_path), "a run")
        wait_for(lambda: runner._running)
        time.sleep(0.2)
        runner.stop()
        assert ended.result(60) is False
    assert json.loads(path.read_text()) == {"seconds": 5.0, "running": False}


def test_a_signal_ends_runs_at_a_checkpoint_and_a_second_call_continues_them(out: Path) -> None:
    with harness(out) as first:
        wait_for(lambda: is_training(out))
        os.kill(first.pid or 0, signal.SIGTERM)
        first.join(100)
        assert first.exitcode == 75
    assert events(out)[-1] == "preempted"
    assert not (out / RECORD).exists()
    seconds, running = cost(out).values()
    assert seconds > 0
    assert not running
    with harness(out) as second:
        second.join(100)
        assert second.exitcode == 0
    assert [event for event in events(out) if event in {"started", "resumed", "finished"}] == [
        "started", "resumed", "finished",
    ]  # fmt: skip
    made = records.read(out / RECORD)
    assert made.core_seconds == pytest.approx(cost(out)["seconds"], abs=0.05)
    assert made.core_seconds > seconds  # of both starts


def test_a_killed_harness_leaves_no_run_and_an_unknown_cost(out: Path) -> None:
    with harness(out) as first:
        wait_for(lambda: is_training(out))
        holder = re.search(r"process (\d+)", (out / RUN / "lock").read_text())
        first.kill()
    assert holder
    wait_for(lambda: not Path(f"/proc/{holder[1]}").exists(), seconds=10)
    assert cost(out)["running"]
    with harness(out) as second:
        second.join(100)
        assert second.exitcode == 0
    assert records.read(out / RECORD).core_seconds is None


def test_a_run_that_fails_ends_with_the_end_of_its_log(out: Path) -> None:
    prose = study("prose")
    wrong = Variant("wrong", "wrong", ("data.tokenizer=/nowhere",))
    runner = quick.ForkingRunner(1, out / "records")
    with pytest.raises(RuntimeError, match=r"wrong-seed1 ended with 2; the end of .*log.txt:\n(.*\n)*.*/nowhere"):
        list(runner.run([Task(prose, wrong, 1, out / "runs")]))
    assert list(runner.run([Task(prose, wrong, 2, out / "runs")])) == [(Task(prose, wrong, 2, out / "runs"), None)]
    assert not (out / "records").exists()


def test_other_settings_are_told_and_never_mixed(out: Path, capsys: pytest.CaptureFixture) -> None:
    with harness(out, steps=4) as first:
        first.join(100)
    told = "evaluate.every was 4 and is 2; train.steps was 4 and is 6"
    command.main(["--quick", "--only", "prose", "--list", "--out", str(out)])
    assert f"prose-e4-seed1 was made with other settings: {told}" in capsys.readouterr().out
    command.main(["--quick", "--only", "prose", "--render", "--out", str(out)])
    assert f"other settings than the study has now: 4 experts, seed 1 ({told})." in (out / "evidence.md").read_text()
    (out / RECORD).unlink()
    with pytest.raises(SystemExit, match=rf"begun with other settings \({told}\); set them back"):
        command.main([*ONE, "--out", str(out)])


def test_settings_that_a_record_lacks_had_their_default() -> None:
    config = Task(study("captions"), study("captions").variant("e4"), 1, Path("runs")).config()
    short = config.model_dump(mode="json", exclude_defaults=True)
    assert changed(short, config) == changed(config.model_dump(mode="json"), config) == []
    del short["optimizer"]["warmup_steps"]  # which the study sets
    assert changed(short, config) == ["optimizer.warmup_steps is new"]
    short["data"]["train"][0]["weight"] = 2.0
    assert "data.train[0].weight was 2.0 and is 1.0" in changed(short, config)


def test_the_cost_of_a_run_is_known_only_if_every_start_ended(tmp_path: Path) -> None:
    path = tmp_path / "core_seconds.json"
    cost = Cost(path)
    cost.begin()
    assert Cost(path).seconds == 0  # it ended before it trained
    (tmp_path / "events.jsonl").touch()
    cost.end(2.0)
    again = Cost(path)
    again.begin()
    again.end(3.0)
    assert Cost(path).seconds == 5
    Cost(path).begin()
    assert Cost(path).seconds is None
    path.unlink()
    assert Cost(path).seconds is None  # of a run whose starts are not known


def test_a_process_of_its_own_runs_only_while_its_parent_does() -> None:
    def output(parent: int) -> str:
        code = START.format(parent=parent, program="mmmoe_pretrain.cli")
        return subprocess.run(
            [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
        ).stdout

    assert "Usage" in output(os.getpid())
    assert output(1) == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--only", "nothing"], "there is no study 'nothing'; there are captions"),
        (["--variants", "e5"], "there is no variant e5 in captions"),
        (["--seeds", "9"], "there is no seed 9 in captions"),
        (["--jobs", "0"], "--jobs 0 trains nothing"),
        (["--out", "other"], "--out is of --quick"),
        (["--quick", "--out", str(command.ROOT / "docs" / "quick")], "the place of full runs; name another folder"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(given: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(told)) as ended:
        command.main(given)
    assert "\n" not in str(ended.value)
