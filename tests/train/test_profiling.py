"""``train.profile``: a trace of some steps on some ranks, which changes no number."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.train.faulty import config_in, faulty, logged, signalled


def test_a_trace_has_the_spans_of_its_steps_and_changes_no_number(tmp_path: Path, tiny_data: Path) -> None:
    plain, profiled = (
        config_in(tmp_path / name, tiny_data, train={"steps": 4, **more})
        for name, more in (("plain", {}), ("profiled", {"profile": {"steps": [2, 3], "ranks": [0]}}))
    )
    run_ranks(1, train, plain)
    run_ranks(1, train, profiled)
    assert [record["losses"] for record in logged(profiled)] == [record["losses"] for record in logged(plain)]
    folder = profiled.run_dir / "profile"
    assert [path.name for path in folder.iterdir()] == ["steps_2-3_rank_0.json.gz"]
    with gzip.open(folder / "steps_2-3_rank_0.json.gz") as file:
        trace = json.load(file)
    spans = [event["name"] for event in sorted(trace["traceEvents"], key=lambda event: event.get("ts", 0))
             if event.get("cat") == "user_annotation"]  # fmt: skip
    step = ["data", "forward_backward", "optimizer"]
    assert [name for name in spans if name in step] == step * 2
    operators = {event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"}
    assert "aten::mm" in operators


@pytest.mark.parametrize("stop, names", [(2, ["steps_2-2_rank_0.json.gz"]), (1, [])])
def test_a_trace_that_a_stop_cuts_short_is_named_after_the_steps_that_it_has(
    tmp_path: Path, tiny_data: Path, stop: int, names: list[str]
) -> None:
    profile = {"steps": [2, 5], "ranks": [0]}
    config = config_in(tmp_path, tiny_data, train={"steps": 6, "profile": profile})
    run_ranks(1, faulty, config, partial(signalled, stop))
    assert [path.name for path in (config.run_dir / "profile").glob("*")] == names


@pytest.mark.parametrize("profile, message", [
    ({"steps": [0, 2]}, r"train.profile.steps \[0, 2\] must be the first and the last of at most 20"),
    ({"steps": [2, 1]}, "must be the first and the last"),
    ({"steps": [1, 21]}, "must be the first and the last"),
    ({"steps": [11, 13]}, r"train.profile.steps \[11, 13\] are not all of the 12 of train.steps"),
    ({"steps": [1, 2], "ranks": [-1]}, "train.profile.ranks.0"),
    ({"steps": [1, 2], "stack": True}, "unknown key 'train.profile.stack'"),
])  # fmt: skip
def test_bad_settings_are_refused(tmp_path: Path, tiny_data: Path, profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_in(tmp_path, tiny_data, train={"profile": profile})


def test_a_rank_that_is_not_there_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, train={"profile": {"steps": [1, 2], "ranks": [0, 2]}})
    with pytest.raises(ValueError, match=r"train.profile.ranks \[0, 2\]: the job has the ranks 0 to 1"):
        resolve_layout(config, 2)
