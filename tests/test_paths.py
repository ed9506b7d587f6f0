"""``~`` and ``$VAR`` mean what they mean in a shell, wherever a path is taken."""

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import mmmoe_pretrain.cli
import mmmoe_pretrain.data_prep.cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.engines.deepspeed_config import _own_swap_folder
from mmmoe_pretrain.evaluate.rows import place_of_report
from mmmoe_pretrain.paths import expand, given, make_folder, new_file
from tests.support import tiny_values

PATHS = (("runs_dir",), ("data", "tokenizer"), ("data", "train", 0, "path"), ("evaluate", "test", 0),
         ("checkpoint", "folder"))  # fmt: skip


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("DISK", "/disk")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("NESTED", "$DISK/x")
    monkeypatch.delenv("NOPE", raising=False)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "/h"), ("~/a", "/h/a"), ("$DISK/a", "/disk/a"), ("a/${DISK}b", "a//diskb"), ("$HOME", "/h"),
        ("a~b/~", "a~b/~"), ("./~", "./~"), ("cost$/5$5", "cost$/5$5"), ("", ""),
        ("s3://bucket/~/$NOPE", "s3://bucket/~/$NOPE"), ("file:///$NOPE", "file:///$NOPE"),
        ("~/a::s3://b/$NOPE::~", "/h/a::s3://b/$NOPE::/h"), ("pipe:cat ~/$1", "pipe:cat ~/$1"),
    ],
)  # fmt: skip
def test_a_path_is_expanded_as_by_a_shell_and_a_url_is_not(path: str, expected: str) -> None:
    assert expand(path) == expected
    assert expand(expected) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [("$NOPE/a", "variable NOPE is not set"), ("a/${NOPE}", "variable NOPE is not set"), ("$EMPTY/a", "EMPTY is not"),
     ("~no_such_user/a", "no such user"), ("$NESTED", r"holds \$DISK")],
)  # fmt: skip
def test_what_cannot_be_filled_in_is_named(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(path)


def test_every_path_of_a_config_is_expanded_and_comes_back_the_same(tmp_path: Path) -> None:
    config = run_config.parse(with_paths("~/x"))
    assert [found(config.model_dump(), keys) for keys in PATHS] == ["/h/x"] * len(PATHS)
    run_config.dump(config, tmp_path / "config.yaml")
    assert run_config.load(tmp_path / "config.yaml") == config
    for keys in PATHS:
        values = with_paths("here")
        found(values, keys[:-1])[keys[-1]] = "$NOPE/x"
        with pytest.raises(ValueError, match=rf"{'.'.join(map(str, keys))}: .*variable NOPE is not set"):
            run_config.parse(values)


def with_paths(path: str) -> dict[str, Any]:
    values = tiny_values(Path("unused"), evaluate={"test": [path]}, checkpoint={"folder": path})
    return {**values, "runs_dir": path, "data": {"train": [{"path": path}], "tokenizer": path}}


def found(values: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        values = values[key]
    return values


def test_the_swap_folder_of_deepspeed_is_expanded() -> None:
    offload = {"nvme_path": "$DISK/swap"}
    _own_swap_folder(offload, "run")
    assert offload["nvme_path"] == "/disk/swap/run"


def commands(app: typer.Typer) -> Iterator[Callable[..., Any]]:
    yield from (command.callback for command in app.registered_commands if command.callback)
    for group in app.registered_groups:
        yield from commands(group.typer_instance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "app", [mmmoe_pretrain.cli.app, mmmoe_pretrain.data_prep.cli.app], ids=["mmmoe", "mmmoe-data"]
)
def test_every_path_of_the_command_lines_goes_through_the_rule(app: typer.Typer) -> None:
    seen = 0
    for command in commands(app):
        hints = typing.get_type_hints(command, include_extras=True)
        for name in inspect.signature(command).parameters:
            kind, *extras = typing.get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
            if "Path" in str(kind) or name == "test":
                seen += 1
                assert extras and extras[0].callback is given, f"{command.__name__}: {name} needs callback=given"
    assert seen > 5


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [(mmmoe_pretrain.cli, ["train", "~/x.yaml"], "no config at /h/x.yaml"),
     (mmmoe_pretrain.cli, ["evaluate", "$NOPE/run"], "$NOPE/run: the environment variable NOPE is not set"),
     (mmmoe_pretrain.data_prep.cli, ["tokenizer", "~/a", "$NOPE/b", "--vocab-size", "9", "--out", "c"],
      "NOPE is not set"),
     (mmmoe_pretrain.data_prep.cli, ["verify", "~/shards"], "/h/shards")],
    ids=["mmmoe ~", "mmmoe $", "mmmoe-data $", "mmmoe-data ~"],
)  # fmt: skip
def test_a_command_takes_the_path_that_a_shell_would_take(
    module: Any,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_for_results_that_cannot_be_made_or_written_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(ValueError, match=f"^{path} cannot be made: {why}; choose another --out"):
            make_folder(path)
    (tmp_path / "gone").symlink_to("/proc/self")  # no file can be made there, not even by root
    with pytest.raises(ValueError, match=r"gone cannot be written: No such file .*; choose another --out"):
        make_folder(tmp_path / "gone")
    assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "b"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "routing.json").mkdir()
    assert place_of_report(tmp_path, "routing.json", ["shards"], None) == tmp_path  # no report of other shards
    with (
        pytest.raises(ValueError, match=r"routing\.json is a folder, and a file"),
        new_file(tmp_path / "routing.json"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]
