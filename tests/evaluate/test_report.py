"""The report's schema, its tables and the dense column."""

import json
from pathlib import Path

import pytest

from mmmoe_pretrain.evaluate.report import (
    Report,
    print_table,
    read_dense,
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


def report(dense: dict[str, float] | None = None) -> Report:
    routing = {"layers": [LAYER], "figure": "routing.png"}
    return Report(
        "demo", 300, "2026-01-01T00:00:00+00:00", ["a/test"], rows_of(SCORES, dense), routing, ["few clips [fr]"]
    )


@pytest.mark.parametrize(
    ("dense", "lines"),
    [
        (None, ["| metric | value | 95% | chance | majority | n | candidates |",
                "| image_to_text_r1 | 8.1% | [5.0%, 13.0%] | 0.6% | 1.2% | 173 | 173 |",
                "| captions_perplexity | 12.3 | [11.0, 13.9] | 4,096 | 321.0 | 2,048 | - |",
                "- few clips [fr]",
                "layer 1: specialisation 50% (0.50 of 1.00 bits; untrained 10%), 1 dead expert of 2",
                "| 1 | text | 10 | 1.6 of 2 | 0.80 | 25.0% | 1: 80%, 0: 20% | 1 |"]),
        ({"image_to_text_r1": 0.07}, ["| chance | majority | dense | n |", "| 0.6% | 1.2% | 7.0% | 173 |",
                                      "| 4,096 | 321.0 | - | 2,048 |", "Dense is a recorded run without experts"]),
    ],
)  # fmt: skip
def test_the_page_has_the_values_beside_their_baselines(
    dense: dict[str, float] | None, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(report(dense), tmp_path)
    page = (tmp_path / "report.md").read_text()
    for line in lines:
        assert line in page
    assert ("ense" in page) == (dense is not None)
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["results"][0]["interval"] == [0.05, 0.13]
    print_table(report(dense))
    shown = capsys.readouterr().out
    assert "8.1%" in shown and "few clips [fr]" in shown
    assert ("7.0%" in shown) == (dense is not None)


def test_a_table_that_is_piped_is_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes a pipe for a terminal of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "image_and_audio_to_text_in_every_language_zero_shot_balanced"
    scores = [Score(name, 0.0812, 0.0058, 0.0116, 173, (0.05, 0.13), 173)]
    print_table(Report("demo", 300, "", [], rows_of(scores, {name: 0.07}), {"layers": [LAYER]}))
    row, *_ = [line.split() for line in capsys.readouterr().out.splitlines() if "8.1%" in line]
    assert row == [name, "8.1%", "[5.0%,", "13.0%]", "0.6%", "1.2%", "7.0%", "173"]


def test_one_modality_alone_has_no_specialisation() -> None:
    alone = {**LAYER, "specialisation": 0.0, "specialisation_bits": 0.0, "modality_bits": 0.0}
    assert specialisation_line(alone) == "1 dead expert of 2"


def test_dense_column_comes_from_the_recorded_run_of_the_same_shards(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"dense": {"test": ["a"], "results": [{"metric": "image_to_text_r1", "value": 0.07}]}}')
    assert read_dense(path, ["a"]) == {"image_to_text_r1": 0.07}
    assert read_dense(path, ["b"]) is None
    assert read_dense(None, ["a"]) is None
    with pytest.raises(ValueError, match="no such file"):
        read_dense(tmp_path / "absent.json", ["a"])


@pytest.mark.parametrize("text", ["{}", "not json", '{"dense": {"test": [], "results": [{"metric": "x"}]}}', "[]"])
def test_malformed_record_is_refused_not_read_as_missing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="records no dense run"):
        read_dense(path, [])


def test_a_folder_in_the_place_of_a_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ValueError, match=r"report\.json is a folder"):
        write(Report("run", 1, "today", ["test"], [], {"layers": []}), tmp_path)
