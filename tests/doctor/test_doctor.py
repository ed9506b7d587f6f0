"""``mmmoe doctor`` on two ranks that stand for two hosts: each fault is found, its host named, and no rank waits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain import cli, exit_codes
from mmmoe_pretrain.doctor import folder, network, run, traffic
from mmmoe_pretrain.doctor.peer import Peer, Subject, join
from mmmoe_pretrain.doctor.run import CHECKS, Check, Examination
from tests.distributed import run_ranks
from tests.support import tiny_config

ROOT = Path(__file__).parents[2]
SECONDS = 1.0  # of a check that does not end


def on_two_hosts(
    subject: Subject, only: Sequence[str] = (), disturb: Callable[[], None] = lambda: None, **limits: float
) -> tuple[list[int], dict[str, tuple[str, str]]]:
    """The exit codes of both, and the result of each check; ``disturb`` is called on the second one."""

    def rank() -> tuple[int, dict[str, tuple[str, str]]]:
        number = os.environ["RANK"]
        os.environ.update(GROUP_RANK=number, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        socket.gethostname = lambda: f"host{number}"
        if number == "1":
            disturb()
        work = Examination(join(subject, 10.0), time.monotonic() + 30.0)
        chosen = [replace(check, seconds=limits.get(check.name, 15.0)) for check in run.CHECKS]
        try:
            code = work.run([check for check in chosen if not only or check.name in only])
        except dist.DistError:  # rank 0 has not waited for this one, and ended
            code = exit_codes.FAULT
        return code, {result.check: (result.result, result.seen) for result in work.results}

    (code, results), (other, _) = run_ranks(2, rank, timeout=30.0)
    return [code, other], results


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests slow down transfers, and its disk may be nearly full."""
    monkeypatch.setattr(traffic, "SLOW", 0.0)
    monkeypatch.setattr(folder, "LEAST_FREE", 0)
    monkeypatch.setattr(network, "TRANSFER", network.FIRST)


def test_nothing_is_found_where_nothing_is_wrong_and_training_can_follow(tmp_path: Path, tiny_data: Path) -> None:
    config = tiny_config(tmp_path, data={"train": [{"path": str(tiny_data / "train")}],
                                         "tokenizer": str(tiny_data / "tokens.model")})  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json())

    def examined() -> list[bool]:
        os.environ.update(GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0")
        kept = run.examine(Subject(path))
        was = dist.is_initialized()
        dist.init_process_group("gloo")  # the keys of the first group are no hindrance
        dist.barrier()
        dist.destroy_process_group()
        del kept
        return [was]

    codes, results = on_two_hosts(Subject(path))
    assert codes == [0, 0]
    assert {level for level, _ in results.values()} == {"ok"}, results
    assert [*results] == [check.name for check in CHECKS]
    assert run_ranks(2, examined) == [[False]] * 2
    assert not list(tmp_path.rglob(".mmmoe-doctor-*"))


def test_a_host_that_sees_another_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.5)

    def sees_another() -> None:
        real = Path.open
        (tmp_path / "other").mkdir()
        Path.open = lambda path, *args, **more: real(tmp_path / "other" / path.name, *args, **more)  # type: ignore

    codes, results = on_two_hosts(Subject(run_dir=tmp_path / "run"), ["disk", "shared folder"], sees_another)
    assert codes == [1, 1]
    told = f"host1 and the first host do not see each other's files in {tmp_path}"
    assert results["shared folder"] == ("FAILED", told)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_config_that_one_host_cannot_read_is_a_failed_check_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text(tiny_config(tmp_path).model_dump_json())

    def unreadable() -> None:
        os.chdir(tmp_path / "other")

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    codes, results = on_two_hosts(Subject(Path("run.json")), ["layout", "disk"], unreadable)
    assert codes == [1, 1]
    assert results["layout"][0] == "FAILED"
    assert results["layout"][1].startswith("host1: no config at run.json")
    assert results["disk"][1].startswith("host1: ValueError: the config run.json could not be read here")


def test_without_config_and_folder_their_checks_are_not_run() -> None:
    codes, results = on_two_hosts(Subject())
    assert codes == [0, 0]
    no_folder = "neither CONFIG nor --run-dir"
    not_run = {name: seen for name, (level, seen) in results.items() if level == "not run"}
    assert not_run == {"layout": "no CONFIG", "data": "no CONFIG", "disk": no_folder, "shared folder": no_folder}
    assert {level for level, _ in results.values()} == {"ok", "not run"}


def wrong_sums() -> None:
    real = dist.all_reduce

    def broken(tensor: torch.Tensor, *args: Any, **settings: Any) -> Any:
        work = real(tensor, *args, **settings)
        tensor += 1
        return work

    dist.all_reduce = broken


def wrong_blocks() -> None:
    real = dist.all_to_all_single

    def broken(received: torch.Tensor, sent: torch.Tensor) -> Any:
        sent = sent.clone()
        sent[0, 7] += 1  # for host0
        return real(received, sent)

    dist.all_to_all_single = broken


def wrong_transfers() -> None:
    real = dist.send

    def broken(values: torch.Tensor, target: int) -> Any:
        return real(values + (len(values) > 1), target)

    dist.send = broken


@pytest.mark.parametrize(
    ("disturb", "check", "told"),
    [
        (wrong_sums, "all-reduce", "host1 gets wrong numbers from all"),
        (wrong_blocks, "all-to-all", "host0 gets wrong numbers from host1"),
        (wrong_transfers, "point to point", "host0 gets wrong numbers from host1"),
    ],
)
def test_wrong_numbers_are_seen_and_their_host_named(disturb: Callable[[], None], check: str, told: str) -> None:
    codes, results = on_two_hosts(Subject(), ["process group", check], disturb)
    assert codes == [1, 1]
    assert results[check] == ("FAILED", told)


def never_joins() -> None:
    """Its thread hangs before the collective."""
    run.CHECKS = tuple(
        replace(check, measure=lambda peer: time.sleep(60)) if check.name == "all-reduce" else check
        for check in CHECKS
    )


def never_answers() -> None:
    """Its process hangs."""
    measure = Examination._measure

    def slow(self: Examination, check: Check, seconds: float) -> Any:
        time.sleep(SECONDS + run.MARGIN + 0.3 if check.name == "all-reduce" else 0.0)
        return measure(self, check, seconds)

    Examination._measure = slow  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("disturb", "told", "then"),
    [
        (never_joins, "host1 did not end it within 1 s", "after all-reduce"),
        (never_answers, "host1 did not answer within 2 s", "host1 did not answer"),
    ],
)
def test_a_host_that_never_joins_a_check_ends_it_in_time_and_is_named(
    disturb: Callable[[], None], told: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MARGIN", 0.6)
    began = time.monotonic()
    codes, results = on_two_hosts(
        Subject(), ["process group", "all-reduce", "all-to-all", "clocks"], disturb, **{"all-reduce": SECONDS}
    )
    assert codes == [1, 1]
    assert results["all-reduce"] == ("FAILED", told)
    assert results["all-to-all"] == ("not run", then)
    assert time.monotonic() - began < 15.0


def slow_but_in_time() -> None:
    run.CHECKS = tuple(replace(check, measure=lambda peer: time.sleep(1.5) or 1 << 40) for check in CHECKS)


def test_a_host_that_is_slower_than_the_first_has_the_time_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """E.g. it reads its code from a slow disk."""
    monkeypatch.setattr(run, "MARGIN", 0.3)
    codes, results = on_two_hosts(Subject(), ["shared memory"], slow_but_in_time)
    assert (codes, results["shared memory"][0]) == ([0, 0], "ok")


def test_a_rank_that_is_not_there_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, only rank 0 starts."""

    def alone() -> Peer | str:
        os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
        return run.hosts_result(join(Subject(), 1.0)).seen

    assert run_ranks(1, alone) == ["node (number 1) did not answer (rank 1)"]


def test_one_process_prints_one_json_object_and_its_exit_code_tells_of_failures(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [
        sys.executable,
        "-m",
        "mmmoe_pretrain.cli",
        "doctor",
        "--json",
        f"--run-dir={tmp_path / 'file' / 'run'}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    report = json.loads(found.stdout)
    rows = {row["check"]: row for row in report["checks"]}
    assert [*rows] == ["hosts", *(check.name for check in CHECKS)]
    assert rows["layout"]["result"] == rows["data"]["result"] == "not run"
    assert rows["disk"]["result"] == "FAILED"
    assert rows["disk"]["seen"].endswith("/file (Not a directory)")
    assert found.returncode == report["exit_code"] == exit_codes.FAULT


def test_a_failed_check_is_told_to_the_launcher_which_must_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(exit_codes.EXIT_FILE, str(tmp_path / "code"))
    assert exit_codes.record(exit_codes.FAULT, final=True) == 0
    assert (tmp_path / "code").read_text() == "1\n"


def test_a_config_that_is_not_there_is_bad_usage() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        cli.doctor(Path("nowhere.yaml"))
