"""The commands as a user runs them: exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep import cli
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
    assert error.startswith(f"mmmoe-data: there is nothing at {tmp_path}/nowhere; ")
    assert error.count("\n") == 1


def test_a_warning_does_not_steer_the_terminal(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"key": "a", "text": "b", "\\u001b[2J": "a.jpg"}\n')
    command = [
        sys.executable,
        "-m",
        "mmmoe_pretrain.data_prep.cli",
        "shard",
        tmp_path / "rows.jsonl",
        "--dry-run",
        "--out",
        "out",
    ]
    ended = subprocess.run(command, capture_output=True, check=True)
    assert rb"field \x1b[2J names files" in ended.stderr and b"\x1b" not in ended.stderr


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


@pytest.mark.parametrize("command", ["inspect", "verify", "index", "tokenizer", "preview"])
def test_with_json_stdout_is_one_object(command: str, tiny_data: Path, tmp_path: Path, monkeypatch, capsys):
    paths = {"preview": tmp_path / "run.yaml"}
    run_config.dump(tiny_config(tiny_data), paths["preview"])
    more = ("--vocab-size", 300, "--out", tmp_path / "t.model") if command == "tokenizer" else ()
    assert run(monkeypatch, command, paths.get(command, tiny_data / "train"), "--json", *more) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("command", ["corpus", "index", "tokenizer"])
def test_a_dry_run_writes_nothing(command: str, tmp_path: Path, monkeypatch, capsys):
    write_shards(tmp_path / "shards", things(4))
    if command != "index":
        open_indexed(tmp_path / "shards")
    before = sorted(tmp_path.rglob("*"))
    args = {
        "corpus": ("mini", "--out", tmp_path / "new"),
        "index": (tmp_path / "shards",),
        "tokenizer": (tmp_path / "shards", "--vocab-size", 300, "--out", tmp_path / "new.model"),
    }
    assert run(monkeypatch, command, *args[command], "--dry-run") == 0
    assert "would" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_every_command_has_an_example_and_the_version_is_told(monkeypatch, capsys):
    assert all((command.epilog or "").startswith("Example: mmmoe-data ") for command in cli.app.registered_commands)
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("mmmoe-data 0.")


APP = """
    import signal, time, typer
    from mmmoe_pretrain.data_prep import console, pool
    app = typer.Typer()

    @app.command()
    def sleep() -> None:
        with console.kept("two are kept; repeat the command"):
            for done in pool.map_in_order(time.sleep, [0.01, 0.01, *[30.0] * 9], 2):
                console.say("done")

    @app.command()
    def talk() -> None:
        while True:
            console.say("a line")

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of pytest-xdist ignore it
        console.run(app, "app")
"""


def start(folder: Path, command: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A command of APP in a process group of its own."""
    (folder / "app.py").write_text(textwrap.dedent(APP), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(folder / "app.py"), command], text=True, stdout=stdout, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9)],
)
def test_a_signal_leaves_no_process_and_says_what_is_kept(tmp_path: Path, number: int, to_group: bool, code: int):
    process = start(tmp_path, "sleep")
    try:
        assert process.stdout.readline() + process.stdout.readline() == "done\ndone\n"
        assert len(running(process.pid)) >= 3  # two workers
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=10)
        assert process.returncode == code
        name = {130: "interrupted", 143: "terminated"}.get(code)
        assert not name or error == f"app: {name}; two are kept; repeat the command\n"
        end = time.monotonic() + 5
        while (left := running(process.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left
    finally:
        if running(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def running(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


def test_a_closed_pipe_ends_a_command_silently(tmp_path: Path):
    read_end, write_end = os.pipe()
    process = start(tmp_path, "talk", write_end)
    os.close(write_end)
    os.close(read_end)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (141, "")
