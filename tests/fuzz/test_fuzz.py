"""Over 2,000 damaged inputs: each is used, skipped and counted, or refused by a message that names the file.

``python -m tests.fuzz.run --cases 20000 --seed 7`` runs more, and prints the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.runner import FAULTS, Case, count, run_cases
from tests.fuzz.targets import TARGETS, Target, Workplace

SEED = 5
CASES = {"checkpoint": 300, "shard": 160, "config": 160, "override": 80, "media": 120, "bmp": 60, "gif": 60}
USUAL = 110  # cases of the other targets


def test_there_are_at_least_two_thousand_cases() -> None:
    assert sum(CASES.get(name, USUAL) for name in TARGETS) >= 2000


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
    place = Workplace(tmp_path)
    for name in ("png", "mp3", "shard", "manifest", "config"):
        first, again = (TARGETS[name].make(Random(f"{name}:3:9"), place) for _ in range(2))
        assert first == again
        assert first != TARGETS[name].make(Random(f"{name}:3:10"), place)


def crashes(data: int, place: Workplace) -> tuple[str, str]:
    """What the fuzzer must not miss, by number."""
    if data == 1:
        import ctypes

        ctypes.string_at(0)
    if data == 2:
        while True:
            pass
    if data == 3:
        bytearray(700 << 20)[::4096] = b"x" * (700 << 8)
    if data == 4:
        raise KeyError("damaged.txt")
    if data == 5:
        raise ValueError("something is wrong somewhere")
    if data == 6:
        place.marker.touch()
    if data == 7:
        raise ValueError("damaged.txt is damaged")
    if data == 8:
        bytearray(1 << 40)
    return "accepted", ""


def test_the_runner_sees_every_fault_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.runner.CPU_SECONDS", 0.5)
    numbers = iter(range(100))
    target = Target("broken", lambda rng, place: 0, crashes, lambda place: ("damaged.txt",), lambda place: None)
    found = []
    for number in range(10):
        one = Target(target.name, lambda rng, place, n=number: n, target.use, target.names, target.prepare)
        found += run_cases(one, 0, [next(numbers)])
    outcomes = [
        "accepted",
        "crashed",
        "hung",
        "grown",
        "crashed",
        "crashed",
        "ran_code",
        "refused",
        "crashed",
        "accepted",
    ]
    assert [case.outcome for case in found] == outcomes
    assert "SIGSEGV" in found[1].detail and "names no file" in found[5].detail and "MemoryError" in found[8].detail
    assert "--target broken --seed 0 --only 1" in str(found[1])


def test_a_crash_costs_one_case_of_a_chunk() -> None:
    import ctypes

    def use(number: int, place: Workplace) -> tuple[str, str]:
        if number == 0:
            ctypes.string_at(0)
        return "accepted", ""

    target = Target("some", lambda rng, place: rng.randrange(4), use, lambda place: (), lambda place: None)
    began = time.monotonic()
    found = list(run_cases(target, 0, range(40)))
    assert [case.number for case in found] == list(range(40))
    assert {case.outcome for case in found} == {"accepted", "crashed"}
    assert isinstance(found[0], Case) and time.monotonic() - began < 60
