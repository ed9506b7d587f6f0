"""Over 2,000 damaged inputs: each is used, skipped and counted, or refused by a message that names the file.

``python -m tests.fuzz.run --cases 20000 --seed 7`` runs more, and prints the same.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.run import FAULTS, count, run_cases
from tests.fuzz.targets import TARGETS, Target, Workplace

SEED = 5
CASES = {"checkpoint": 300, "shard": 160, "config": 160, "override": 80, "media": 120, "bmp": 60, "gif": 60,
         "zip": 70, "table": 60, "parquet": 60, "sidecar": 50, "dedup": 30}  # fmt: skip
USUAL = 110  # cases of the other targets


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_used_skipped_or_refused_and_nothing_else(name: str) -> None:
    cases = list(run_cases(TARGETS[name], SEED, range(CASES.get(name, USUAL))))
    assert [case.number for case in cases] == list(range(CASES.get(name, USUAL)))
    bad = [str(case) for case in cases if case.outcome in FAULTS]
    assert not bad, "\n".join(bad)
    found = count(cases)
    assert found["skipped"] + found["refused"] > 0, "the damage did nothing"
    assert found["accepted"] > 0 or name == "tokenizer", "nothing gets through: the whole input is refused, too"


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    for name in ("png", "mp3", "shard", "manifest", "config"):
        place = Workplace(tmp_path / name)
        place.folder.mkdir()
        TARGETS[name].prepare(place)
        first, again = (TARGETS[name].make(Random(f"{name}:3:9"), place) for _ in range(2))
        assert first == again
        assert first != TARGETS[name].make(Random(f"{name}:3:10"), place)


def crashes(number: int, place: Workplace) -> tuple[str, str]:
    """What the fuzzer must not miss, by the number of the case."""
    if number == 1:
        ctypes.string_at(0)
    if number == 2:
        while True:
            pass
    if number == 3:
        bytearray(700 << 20)[::4096] = b"x" * (700 << 8)
    if number == 4:
        raise KeyError("damaged.txt")
    if number == 5:
        raise ValueError("something is wrong somewhere")
    if number == 6:
        place.marker.touch()
    if number == 7:
        raise ValueError("damaged.txt is damaged")
    if number == 8:
        bytearray(1 << 40)
    return "accepted", ""


def test_the_runner_sees_every_fault_and_runs_the_cases_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.run.CPU_SECONDS", 3.0)  # 700 MB of pages take a third of a second or more
    numbers = {Random(f"broken:0:{number}").random(): number for number in range(10)}
    target = Target("broken", lambda rng, place: numbers[rng.random()], crashes, ("damaged.txt",), lambda place: None)
    found = list(run_cases(target, 0, range(10)))
    assert [case.number for case in found] == list(range(10))
    assert [case.outcome for case in found] == [
        "accepted", "crashed", "hung", "grown", "crashed", "crashed", "ran_code", "refused", "crashed", "accepted",
    ]  # fmt: skip
    assert "SIGSEGV" in found[1].detail and "names no file" in found[5].detail and "MemoryError" in found[8].detail
    assert "--target broken --seed 0 --only 1" in str(found[1])
