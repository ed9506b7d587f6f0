"""The commands as a user runs them: exit codes, one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep import cli


def run(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mmmoe-data", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_shard_verify_inspect_and_tokenizer_work_together(make_manifest, tmp_path: Path, monkeypatch, capsys):
    manifest, out = make_manifest(9), tmp_path / "shards[/x]"  # not markup
    assert run(monkeypatch, "shard", manifest.parent, "--out", out, "--workers", 1, "--filter", "subset=odd") == 0
    assert run(monkeypatch, "verify", out) == 0
    assert "no problems in 5 samples of 2 shards" in capsys.readouterr().out.replace("\n", " ")
    assert run(monkeypatch, "inspect", out) == 0
    assert run(monkeypatch, "inspect", manifest) == 0
    assert run(monkeypatch, "tokenizer", manifest, "--out", tmp_path / "t.model", "--vocab-size", 310) == 0
    assert (tmp_path / "t.model").is_file()
    assert run(monkeypatch, "index", out / "train", f"{out}/test::{out}/train", "--workers", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", ")[0] for line in lines[-2:]] == [
        f"{out}/train: 3 samples in 1 shards", f"{out}/test::{out}/train: 5 samples in 2 shards"
    ]  # fmt: skip
    (out / "train/shards.index").write_bytes(b"")
    assert run(monkeypatch, "verify", out) == 1


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys):
    assert run(monkeypatch, "shard", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("mmmoe-data: no manifest at ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--samples-per-shard=0", "--image-size=0", "--audio-rate=999", "--audio-rate=192001", "--max-bad-fraction=1.1"],
)
def test_an_option_out_of_its_range_is_refused(tmp_path: Path, monkeypatch, capsys, option: str):
    assert run(monkeypatch, "shard", tmp_path, "--out", tmp_path / "out", option) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_mini_unpacks(tmp_path: Path, monkeypatch):
    assert run(monkeypatch, "corpus", "mini", "--out", tmp_path) == 0
    assert (tmp_path / "manifest.jsonl").is_file()
