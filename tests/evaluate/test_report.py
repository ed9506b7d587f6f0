"""The report's schema, its tables and the dense column."""

import json
from pathlib import Path

import pytest

from mmmoe_pretrain.evaluate.report import (
    Report,
    markdown,
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
        "demo", 300, "2026-01-01T00:00:00+00:00", ["a/test"], rows_of(SCORES, dense), routing, ["few clips"]
    )


def test_json_carries_every_number_beside_its_baselines(tmp_path: Path) -> None:
    write(report({"image_to_text_r1": 0.07}), tmp_path)
    raw = json.loads((tmp_path / "report.json").read_text())
    assert set(raw) == {"run", "step", "date", "test", "results", "routing", "notes"}
    first, second = raw["results"]
    assert first == {
        "metric": "image_to_text_r1", "value": 0.0812, "chance": 0.0058, "majority": 0.0116, "dense": 0.07,
        "n": 173, "interval": [0.05, 0.13], "candidates": 173, "unit": "share",
    }  # fmt: skip
    assert second["dense"] is None


def test_markdown_puts_the_value_beside_what_it_must_beat() -> None:
    text = markdown(report())
    assert "| metric | value | 95% | chance | majority | n | candidates |" in text
    assert "| image_to_text_r1 | 8.1% | [5.0%, 13.0%] | 0.6% | 1.2% | 173 | 173 |" in text
    assert "| captions_perplexity | 12.3 | [11.0, 13.9] | 4,096 | 321.0 | 2,048 | - |" in text
    assert "- few clips" in text
    assert "layer 1: specialisation 50% (0.50 of 1.00 bits; untrained 10%), 1 dead expert of 2" in text
    assert "| 1 | text | 10 | 1.6 of 2 | 0.80 | 25.0% | 1: 80%, 0: 20% |" in text


def test_one_modality_alone_has_no_specialisation() -> None:
    alone = {**LAYER, "specialisation": 0.0, "specialisation_bits": 0.0, "modality_bits": 0.0}
    assert specialisation_line(alone) == "1 dead expert of 2"


def test_console_table_shows_all_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(report({"image_to_text_r1": 0.07}))
    out = capsys.readouterr().out
    assert "dense" in out
    assert "8.1%" in out
    assert "7.0%" in out
    assert "few clips" in out


def test_dense_column_comes_from_the_recorded_run_of_the_same_shards(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"dense": {"test": ["a"], "results": [{"metric": "image_to_text_r1", "value": 0.07}]}}')
    assert read_dense(path, ["a"]) == {"image_to_text_r1": 0.07}
    assert read_dense(path, ["b"]) is None
    assert read_dense(None, ["a"]) is None
    with pytest.raises(ValueError, match="no such file"):
        read_dense(tmp_path / "absent.json", ["a"])


def test_a_recorded_run_adds_its_column_and_what_the_column_means() -> None:
    text = markdown(report({"image_to_text_r1": 0.07}))
    assert "| chance | majority | dense | n |" in text
    assert "| 0.6% | 1.2% | 7.0% | 173 |" in text
    assert "| 4,096 | 321.0 | - | 2,048 |" in text
    assert "Dense is a recorded run without experts" in text


@pytest.mark.parametrize("text", ["{}", "not json", '{"dense": {"test": [], "results": [{"metric": "x"}]}}', "[]"])
def test_malformed_record_is_refused_not_read_as_missing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="records no dense run"):
        read_dense(path, [])
