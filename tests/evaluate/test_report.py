"""The report's schema, its tables and the column of another run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmmoe_pretrain.evaluate.report import (
    Report,
    markdown,
    print_table,
    read,
    rows_of,
    specialisation_line,
    write,
)
from mmmoe_pretrain.evaluate.scores import Score

SCORES = [
    Score("image_to_text_r1", 0.0812, 0.0058, 0.0116, 173, (0.05, 0.13), 173),
    Score("captions_perplexity", 12.34, 4096.0, 321.0, 2048, (11.0, 13.9), None, "perplexity"),
]
LAYER = {
    "layer": 1, "experts": 2, "specialisation_bits": 0.5, "modality_bits": 1.0, "specialisation": 0.5,
    "specialisation_untrained": 0.1, "dead": [1], "tokens": {"image": 1000.0, "text": 10.0},
    "share": {"image": [0.9, 0.1], "text": [0.2, 0.8]},
    "experts_used": {"image": 1.4, "text": 1.6}, "entropy_bits": {"image": 0.7, "text": 0.8},
    "dropped": {"image": 0.0, "text": 0.25},
}  # fmt: skip


def report(other: Report | None = None) -> Report:
    routing = {"layers": [LAYER], "figure": "routing.png"}
    return Report(
        "demo", 300, "2026-01-01T00:00:00+00:00", ["a/test"], rows_of(SCORES, other), routing, ["few clips [fr]"]
    )


def dense(*rows: tuple[str, float, int]) -> Report:
    """Another run's, of these metrics, values and n."""
    results = [{"metric": metric, "value": value, "n": n} for metric, value, n in rows]
    return Report("dense", 200, "2026-01-01", ["a/test"], results, {}, [])


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (None, ["| metric | value | 95% | chance | majority | n | candidates |",
                "| image_to_text_r1 | 8.1% | [5.0%, 13.0%] | 0.6% | 1.2% | 173 | 173 |",
                "| captions_perplexity | 12.3 | [11.0, 13.9] | 4,096 | 321.0 | 2,048 | - |",
                "- few clips [fr]",
                "layer 1: specialisation 50% (0.50 of 1.00 bits; untrained 10%), 1 dead expert of 2",
                "| 1 | text | 10 | 1.6 of 2 | 0.80 | 25.0% | 1: 80%, 0: 20% | 1 |"]),
        (dense(("image_to_text_r1", 0.07, 173), ("captions_perplexity", 9.0, 2047)),
         ["| chance | majority | dense | n |", "| 0.6% | 1.2% | 7.0% | 173 |",
          "| 4,096 | 321.0 | - | 2,048 |"]),  # 2,047 tokens are others
    ],
)  # fmt: skip
def test_the_page_has_the_values_beside_their_baselines(
    other: Report | None, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(report(other), tmp_path)
    page = (tmp_path / "report.md").read_text()
    for line in lines:
        assert line in page
    assert ("dense" in page) == (other is not None)
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["results"][0]["interval"] == [0.05, 0.13]
    print_table(report(other))
    shown = capsys.readouterr().out
    assert "8.1%" in shown and "few clips [fr]" in shown
    assert ("7.0%" in shown) == (other is not None)


def test_a_table_that_is_piped_is_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes a pipe for a terminal of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "image_and_audio_to_text_in_every_language_zero_shot_balanced"
    scores = [Score(name, 0.0812, 0.0058, 0.0116, 173, (0.05, 0.13), 173)]
    print_table(Report("demo", 300, "", [], rows_of(scores, dense((name, 0.07, 173))), {"layers": [LAYER]}))
    row, *_ = [line.split() for line in capsys.readouterr().out.splitlines() if "8.1%" in line]
    assert row == [name, "8.1%", "[5.0%,", "13.0%]", "0.6%", "1.2%", "7.0%", "173"]


def test_one_modality_alone_has_no_specialisation() -> None:
    alone = {**LAYER, "specialisation": 0.0, "specialisation_bits": 0.0, "modality_bits": 0.0}
    assert specialisation_line(alone) == "1 dead expert of 2"


def test_a_run_with_the_name_of_a_column_has_one_of_its_own(tmp_path: Path) -> None:
    named = replace(dense(("image_to_text_r1", 0.07, 173)), run="value")
    write(report(named), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["value"] == 0.0812
    page = (tmp_path / "report.md").read_text()
    assert "| metric | value | 95% | chance | majority | value | n |" in page
    assert "| 8.1% | [5.0%, 13.0%] | 0.6% | 1.2% | 7.0% | 173 |" in page


def test_a_report_is_read_as_it_was_written_from_its_folder_or_file(tmp_path: Path) -> None:
    write(report(), tmp_path)
    assert read(tmp_path) == read(tmp_path / "report.json") == report()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step": "ten"}, "step is 'ten'"),
        ({"run": None}, "run is None"),
        ({"test": [1]}, r"test is \[1\]"),
        ({"results": {}}, "results is {}"),
        ({"results": [3]}, "a row of its results is 3"),
        *(({"results": [{"metric": "m", "value": value, "n": 1}]}, f"a row .* 'value': {shown}")
          for value, shown in ((None, "None"), (True, "True"), (float("nan"), "nan"), (10**400, "1000"))),
        ({"results": [{"metric": "m", "value": 0.5}]}, "a row of its results is {'metric': 'm', 'value': 0.5}"),
    ],
)  # fmt: skip
def test_a_damaged_report_is_one_clear_error(changes: dict, told: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(asdict(report()) | changes))
    remedy = f"write it with mmmoe evaluate {tmp_path}$"
    with pytest.raises(ValueError, match=rf"report.json is not a report of mmmoe evaluate \({told}.*\); {remedy}"):
        read(path)


def test_a_report_that_is_missing_or_no_json_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"report.json does not exist; write it with mmmoe evaluate {tmp_path}$"):
        read(tmp_path)
    (tmp_path / "report.json").write_text('{"run": ')
    with pytest.raises(ValueError, match=rf"report.json is not JSON .*; write it with mmmoe evaluate {tmp_path}$"):
        read(tmp_path)


def test_a_folder_in_the_place_of_a_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ValueError, match=r"report\.json is a folder"):
        write(Report("run", 1, "today", ["test"], [], {"layers": []}), tmp_path)


def test_the_page_shows_the_experts_of_each_task_where_there_are_two() -> None:
    alone = LAYER | {"share_by_task": {"a": [1.0, 0.0]}}
    one = replace(report(), routing={"layers": [alone], "figure": None})
    assert "which task" not in markdown(one)
    tasks = {"share_by_task": {"a": [1.0, 0.0], "b": [0.5, 0.5]}, "task_specialisation": {"text": 0.31}}
    page = markdown(replace(report(), routing={"layers": [LAYER | tasks], "figure": None}))
    assert "## Which experts serve which task" in page and "- layer 1: text 31%" in page
    assert "| 1 | a | 1.0 of 2 | 0: 100%, 1: 0% |" in page and "| 1 | b | 2.0 of 2 | 0: 50%, 1: 50% |" in page
