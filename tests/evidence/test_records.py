"""Records: what is written is read, and a file that is no record is one clear error."""

import json
from pathlib import Path

import pytest

from evidence import records
from tests.evidence.samples import STUDY, changed_file, point, record, write_study


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for made in (record(), record("four", 2, core_seconds=None), record("more", 3, load=[])):
        path = records.write(made, tmp_path)
        assert path == tmp_path / "names" / f"{made.variant}-seed{made.seed}.json"
        assert records.read(path) == made
    assert sorted(path.name for path in (tmp_path / "names").iterdir()) == [
        "dense-seed1.json", "four-seed2.json", "more-seed3.json",
    ]  # fmt: skip


def test_a_record_written_again_has_the_same_bytes_and_a_line_a_point(tmp_path: Path) -> None:
    path = records.write(record(), tmp_path)
    text = path.read_text()
    assert sum('"step": ' in line for line in text.splitlines()) == 3
    assert records.write(records.read(path), tmp_path).read_text() == text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parameters": None}, "parameters"),
        ({"parameters": -1}, "parameters"),
        ({"flops_per_token": 0}, "flops_per_token"),
        ({"core_seconds": "an hour"}, "core_seconds"),
        ({"points": []}, "points"),
        ({"points": [{"step": 1}]}, "tokens"),
        ({"machine": {"cpu": "A CPU"}}, "cores"),
        ({"gpu": "of a later version"}, "gpu"),
    ],
)
def test_a_record_of_another_version_is_one_clear_error(change: dict, told: str, tmp_path: Path) -> None:
    path = records.write(record(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"seed1.json is not a record of a run \(.*{told}.*; remove it") as error:
        records.read(path)
    assert "\n" not in str(error.value)


def test_a_record_that_lacks_a_field_names_it(tmp_path: Path) -> None:
    path = records.write(record(), tmp_path)
    values = json.loads(path.read_text())
    del values["commit"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"not a record of a run \(.*commit"):
        records.read(path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": ', '{"study": "names"}', "no JSON"])
def test_a_foreign_file_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "names" / "dense-seed1.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"dense-seed1\.json"):
        records.read(path)


def test_the_record_of_another_run_is_told(tmp_path: Path) -> None:
    path = changed_file(tmp_path / "names" / "dense-seed1.json", record(seed=2))
    with pytest.raises(ValueError, match=r"is the record of another run \(names/dense, seed 2\)"):
        records.read(path)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        record(points=[point(30, float("nan"))])
    with pytest.raises(ValueError, match="perplexity"):
        record(points=[point(30, None)])  # as metrics.jsonl writes them


def test_a_score_that_a_run_lacks_is_told_with_those_it_has() -> None:
    with pytest.raises(ValueError, match=r"names/dense, seed 1 has no loss at step 30; it has perplexity, recall"):
        record().score("loss")


def test_a_study_has_the_records_that_are_there(tmp_path: Path) -> None:
    assert records.read_study(STUDY, tmp_path) == {}
    write_study(tmp_path, {"dense": [20, 21], "more": [18]})
    found = records.read_study(STUDY, tmp_path)
    assert {name: sorted(by_seed) for name, by_seed in found.items()} == {"dense": [1, 2], "more": [1]}
    assert found["dense"][2].score("perplexity") == 21


def test_seeds_with_scores_of_other_steps_are_told(tmp_path: Path) -> None:
    write_study(tmp_path, {"dense": [20]})
    records.write(record(seed=2, points=[point(10, 20.0)]), tmp_path)
    with pytest.raises(ValueError, match=r"names/dense have scores of different steps \(seed 1: 10, 20, 30; seed 2"):
        records.read_study(STUDY, tmp_path)
