"""The commands as a user runs them: exit codes, one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep import cli
from mmmoe_pretrain import config as run_config
from tests.data.servers import every, http_server
from tests.support import things, tiny_config, tiny_values, write_shards


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
        f"{out}/train: 3 samples in 1 shard", f"{out}/test::{out}/train: 5 samples in 2 shards"
    ]  # fmt: skip
    (out / "train/shards.index").write_bytes(b"")
    assert run(monkeypatch, "verify", out) == 1


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys):
    assert run(monkeypatch, "shard", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("mmmoe-data: no manifest at ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "verify", "index", "preview"])
def test_a_server_without_ranges_is_one_warning_of_every_command(
    command: str, tmp_path: Path, tiny_data: Path, monkeypatch, caplog
):
    rows = things(16)
    for part in range(2):
        write_shards(tmp_path / f"{part}", rows[part::2])
    with http_server(tmp_path) as server:
        server.faults = every(1, "ignore_range")
        urls = [f"{server.url}/{part}/00000.tar" for part in range(2)]
        config = tiny_config(tiny_data, data={**tiny_values(tiny_data)["data"], "train": [{"path": u} for u in urls]})
        run_config.dump(config, tmp_path / "run.yaml")
        assert run(monkeypatch, command, tmp_path / "run.yaml" if command == "preview" else "::".join(urls)) == 0
    assert sum("does not answer range requests" in record.getMessage() for record in caplog.records) == 1


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
