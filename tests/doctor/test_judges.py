"""What the checks of ``mmmoe doctor`` conclude from what the hosts report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmmoe_pretrain.doctor import clock, folder, gpus, limits, network, run_config, traffic, versions
from mmmoe_pretrain.doctor.peer import Channel, Peer, Subject, name_hosts
from mmmoe_pretrain.doctor.result import Result, mismatch, names, size, table
from mmmoe_pretrain.doctor.run import CHECKS, judged

GIB = 1 << 30
CARD = {"index": "0", "name": "H100", "clock": 1980, "reasons": 1, "ecc": 0}


def gpu(**odd: Any) -> dict[str, Any]:
    card = CARD | {key: odd.pop(key) for key in tuple(odd) if key in CARD}
    return {"torch": 1, "ranks": 1, "gpus": [card], "problem": "", "hidden": False} | odd


def disk(free: int = 100 * GIB, error: str = "") -> dict[str, Any]:
    return {"free": free, "place": "runs", "error": error}


def seen(there: bool = True, *unseen: str) -> dict[str, Any]:
    return {"place": "runs", "seen": there, "unseen": list(unseen)}


def layout(digest: str = "d", problem: str = "") -> dict[str, str]:
    return {"problem": problem, "digest": digest, "layout": "data 2"}


@pytest.mark.parametrize(
    ("judge", "reports", "result", "words"),
    [
        (versions.judge, [{"torch": "2.13"}] * 3, "ok", "torch 2.13"),
        (versions.judge, [{"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}], "FAILED",
         "torch: b has 2.12 (the others 2.13)"),
        (versions.judge, [{"torch": "2.13"}, {"torch": "2.12"}], "FAILED", "torch: a has 2.13, b has 2.12"),
        (versions.judge, [{"CUDA": "none", "NCCL": "2"}, {"CUDA": "none"}], "FAILED", "NCCL: a has 2, b has none"),
        (versions.judge, [{"kernel": "6.1"}, {"kernel": "6.2"}, {"kernel": "6.1"}], "warning", "kernel: b has 6.2"),
        (gpus.judge, [gpu(), gpu()], "ok", "1 on each host (H100 of 1980 MHz)"),
        (gpus.judge, [gpu(torch=8), gpu(torch=8), gpu(torch=7)], "FAILED", "GPUs: c has 7 (the others 8)"),
        (gpus.judge, [gpu(), gpu(torch=1, ranks=2)], "FAILED", "b: 1 GPUs for 2 ranks"),
        (gpus.judge, [gpu(), gpu(torch=0)] * 2, "FAILED", "b: torch can use none of 1 GPUs"),
        (gpus.judge, [gpu(torch=0, hidden=True)], "ok", "0 on each host"),
        (gpus.judge, [gpu(), gpu(), gpu(clock=1200)], "warning", "c has H100 of 1200 MHz"),
        (gpus.judge, [gpu(), gpu(reasons=0x44)], "warning", "b GPU 0 is slowed: too hot (hardware)"),
        (gpus.judge, [gpu(), gpu(reasons=0x04)], "ok", ""),  # the power cap of full load
        (gpus.judge, [gpu(), gpu(ecc=3)], "FAILED", "b GPU 0 has 3 uncorrected memory errors"),
        (gpus.judge, [gpu(), gpu(problem="nvidia-smi gave no answer")], "FAILED", "b: nvidia-smi gave no answer"),
        (limits.judge_shared_memory, [8 * GIB, 64 << 20], "warning", "b has 67.1 MB"),
        (limits.judge_shared_memory, [8 * GIB, 2 * GIB], "ok", "2.15 GB or more"),
        (limits.judge_open_files, [[-1, 1040], [1024, 1040]], "FAILED", "b allows 1024"),
        (limits.judge_open_files, [[-1, 1040], [-1, 1040]], "ok", "no limit"),
        (limits.judge_locked_memory, [[1, -1], [1, 65536]], "FAILED", "b allows 65.5 kB"),
        (limits.judge_locked_memory, [[0, 65536]], "ok", "no InfiniBand"),
        (clock.judge, [[0.0, 0.0], [0.5, 0.1]], "ok", "within 0.6 s"),
        (clock.judge, [[0.0, 0.0], [3.0, 0.1]], "warning", "b is 3 s ahead of rank 0 (± 0.1 s)"),
        (clock.judge, [[0.0, 0.0], [-20.0, 0.1]], "FAILED", "b is 20 s behind rank 0"),
        (clock.judge, [[0.0, 0.0], [3.0, 2.5]], "ok", "within 5.5 s"),  # the network may have caused it
        (folder.judge_disk, [disk(), disk(free=20 * GIB)], "ok", "21.5 GB free at runs"),
        (folder.judge_disk, [disk(), disk(free=GIB)], "warning", "b has 1.07 GB free at runs"),
        (folder.judge_disk, [disk(), disk(0, "No space left")], "FAILED", "b cannot write to runs (No space left)"),
        (folder.judge_shared, [seen(), seen()], "ok", "all hosts see each other's files in runs"),
        (folder.judge_shared, [seen(), seen(False)], "FAILED", "b and the first host do not see"),
        (folder.judge_shared, [seen(True, "c"), seen(), seen()], "FAILED", "c and the first host do not see"),
        (run_config.judge_layout, [layout(), layout()], "ok", "data 2"),
        (run_config.judge_layout, [layout("", "size 3 does not fit")] * 2, "FAILED", "size 3 does not fit"),
        (run_config.judge_layout, [layout(), layout("", "no config at x")], "FAILED", "b: no config at x"),
        (run_config.judge_layout, [layout(), layout("e"), layout()], "FAILED", "b has e (the others d)"),
        (run_config.judge_data, [{"count": 1, "missing": []}, {"count": 1, "missing": ["x is not there"]}],
         "FAILED", "b: x is not there"),
        (traffic.judge_collective, [{"wrong": [], "rate": 2e9}, {"wrong": [], "rate": 1e9}], "ok", "exact; 1 GB/s"),
    ],
)  # fmt: skip
def test_a_judge_names_the_host_and_what_is_wrong(judge: Any, reports: Any, result: str, words: str) -> None:
    found = Result.of("check", judge(dict(zip("abcd", reports, strict=False))))
    assert found.result == result
    assert words in found.seen
    assert bool(found.remedy) == (result != "ok")
    assert result == "ok" or not found.seen.startswith("a ")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"a": [], "b": [], "c": []}, []),
        ({"a": ["b"], "b": ["b"], "c": ["b"]}, ["b sends wrong numbers to all"]),
        ({"a": ["b"], "b": [], "c": ["b"]}, ["b sends wrong numbers to all"]),  # what it sends itself is right
        ({"a": [], "b": ["a", "b", "c"], "c": []}, ["b gets wrong numbers from all"]),
        ({"a": [], "b": [], "c": ["b"]}, ["c gets wrong numbers from b"]),
        ({"a": [], "b": ["a"]}, ["b gets wrong numbers from a"]),
    ],
)
def test_wrong_numbers_are_blamed_on_the_rank_that_explains_them(
    wrong: dict[str, list[str]], told: list[str]
) -> None:
    assert traffic.blamed(wrong) == told


RING = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("b", "a"), ("c", "b"), ("d", "c"), ("a", "d")]


@pytest.mark.parametrize(
    ("slow", "result", "told"),
    [
        ({}, "ok", "exact; 8 links, median 100 MB/s"),
        ({("a", "b"): 60e6}, "ok", "least 60 MB/s"),
        ({("c", "b"): 20e6, ("c", "d"): 30e6}, "warning", "c sends 30 MB/s (the median of all links is 100 MB/s)"),
        ({("b", "c"): 20e6, ("d", "c"): 30e6}, "warning", "c receives 30 MB/s (the median of all links is 100 MB/s)"),
        ({("b", "c"): 20e6}, "warning", "b to c: 20 MB/s (the median of all links is 100 MB/s)"),
        ({("b", "c"): 2e6}, "FAILED", "b to c: 2 MB/s (the median of all links is 100 MB/s)"),
    ],
)
def test_a_slow_host_is_named_beside_the_median(slow: dict[tuple[str, str], float], result: str, told: str) -> None:
    rates = dict.fromkeys(RING, 100e6) | slow
    links = {to: {"links": [[a, b, rate] for (a, b), rate in rates.items() if b == to], "wrong": []} for to in "abcd"}
    found = Result.of("links", traffic.judge_links(links))
    assert found.result == result
    assert told in found.seen
    assert result == "ok" or found.seen == told  # nobody else is named


def test_transfers_of_a_round_share_no_rank_and_all_links_are_used_once() -> None:
    assert network.rounds([0]) == []
    assert network.rounds([0, 1]) == [[(0, 1)], [(1, 0)]]
    assert network.rounds([0, 1, 2]) == [[(0, 1)], [(1, 2)], [(2, 0)], [(2, 1)], [(1, 0)], [(0, 2)]]
    for count in (4, 5):
        found = network.rounds(range(count))
        links = [link for each in found for link in each]
        assert sorted(links) == sorted([(i, (i + d) % count) for i in range(count) for d in (1, count - 1)])
        assert all(len({rank for link in each for rank in link}) == 2 * len(each) for each in found)
    assert network.rings([[0, 1], [2, 3], [4, 5]]) == [[0, 2, 4], [1, 3, 5]]  # first ranks, second ranks
    assert network.rings([[0, 1, 2]]) == [[0, 1, 2]]


def test_hosts_are_told_apart_though_they_have_one_name_or_do_not_answer() -> None:
    assert name_hosts({0: ("a", 0), 1: ("a", 0), 2: ("b", 1), 3: ("b", 1)}, 4, 2) == {"a": [0, 1], "b": [2, 3]}
    assert name_hosts({0: ("a", 0), 1: ("a", 1)}, 2, 1) == {"a (number 0)": [0], "a (number 1)": [1]}
    assert name_hosts({0: ("a", 0), 1: ("a", 0), 2: ("b", 1)}, 4, 2) == {"a": [0, 1], "b": [2, 3]}
    assert name_hosts({0: ("a", 0)}, 2, 1) == {"a": [0], "node (number 1)": [1]}


@pytest.mark.parametrize(
    ("reports", "silent", "told"),
    [
        (
            {"a": {"late": network.ALL, "error": ""}, "b": {"late": "", "error": ""}},
            "",
            "b did not end it within 5 s",
        ),
        ({"a": {"late": network.ALL, "error": ""}}, "b", "b did not answer within 7 s"),
        ({"a": {"late": "waited for b", "error": ""}}, "", "not done within 5 s: a waited for b"),
        ({"a": {"value": {"wrong": [], "rate": 1.0}}, "b": {"error": "OSError: x"}}, "", "b: OSError: x"),
    ],
)
def test_who_keeps_the_others_waiting_is_named(reports: dict[str, Any], silent: str, told: str) -> None:
    check = next(check for check in CHECKS if check.name == "all-reduce")
    found = judged(check, reports, silent, 5.0)
    assert (found.result, found.seen) == ("FAILED", told)


def test_a_host_that_hangs_outside_the_network_is_not_sent_to_look_there() -> None:
    check = next(check for check in CHECKS if check.name == "GPUs")
    found = judged(check, {"a": {"late": "", "error": ""}}, "", 5.0)
    assert (found.seen, "driver" in found.remedy) == ("a did not end it within 5 s", True)


def test_links_that_were_measured_count_though_the_check_did_not_end() -> None:
    check = next(check for check in CHECKS if check.name == "point to point")
    links = {"a": [["c", "a", 1e3]], "b": [["a", "b", 100e6]], "c": [["b", "c", 100e6]]}
    late = {
        name: {"late": "waited for c", "error": "", "partial": {"links": its, "wrong": []}}
        for name, its in links.items()
    }
    seen = judged(check, late, "", 5.0).seen
    assert seen.endswith("; c to a: 1 kB/s (the median of all links is 100 MB/s)")


SMI = """\
#!/bin/sh
case $1 in
  *clocks_event*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
esac
%s
"""


@pytest.mark.parametrize(
    ("script", "cards", "problem"),
    [
        ("echo '3, NVIDIA H100 80GB HBM3, 1980, 0x0000000000000028, 2'; echo '4, Old, [N/A], [Not Supported], N/A'",
         [{"index": "3", "name": "NVIDIA H100 80GB HBM3", "clock": 1980, "reasons": 0x28, "ecc": 2},
          {"index": "4", "name": "Old", "clock": None, "reasons": None, "ecc": None}], ""),
        ("echo garbage", [{"index": "garbage", "name": "", "clock": None, "reasons": None, "ecc": None}], ""),
        ("echo 'No devices were found'; exit 6", [], "nvidia-smi: No devices were found"),
        ("printf '\\377'; exit 1", [], "nvidia-smi: \ufffd"),
        ("exec sleep 9", [], "nvidia-smi gave no answer within 0 s"),
    ],
    ids=["two cards", "garbage", "an error", "not UTF-8", "it hangs"],
)  # fmt: skip
def test_what_nvidia_smi_tells_by_either_name_of_a_field(
    script: str, cards: list[Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI % script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "SECONDS", 0.3)
    found = gpus.measure(Peer(Channel(dist.HashStore()), Subject(), labels=["a"], hosts={"a": [0]}))
    assert (found["gpus"], found["problem"]) == (cards, problem)


def test_messages_stay_short_over_a_thousand_hosts() -> None:
    hosts = {f"h{number}": number % 500 for number in range(1000)}
    assert mismatch("x", hosts) == "x: " + ", ".join(f"h{n} has {n}" for n in range(8)) + " and 992 more"
    assert names("abc") == "a, b, c"
    assert [size(n) for n in (999, 1.5e9, 2e15)] == ["999 B", "1.5 GB", "2000 TB"]


def test_the_table_has_a_remedy_under_its_row() -> None:
    assert table([Result("disk", "ok", "much"), Result("clocks", "warning", "b is late", "set it")]).splitlines() == [
        "disk    ok       much",
        "clocks  warning  b is late",
        "                 remedy: set it",
    ]
