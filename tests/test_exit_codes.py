"""What a process tells its launcher."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from mmmoe_pretrain import cli, exit_codes


def test_without_a_launcher_the_code_is_the_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMMOE_EXIT_FILE", raising=False)
    assert exit_codes.record(exit_codes.STOPPED) == 75
    assert not exit_codes.ended_for_good()


def test_a_stopped_worker_ends_well_lest_torchrun_start_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMMOE_EXIT_FILE", str(tmp_path / "code"))
    assert exit_codes.record(exit_codes.STOPPED) == 0
    assert (tmp_path / "code").read_text() == "75\n"
    assert exit_codes.record(exit_codes.HUNG) == 76
    assert exit_codes.record(exit_codes.DONE) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_worker_started_again_after_a_user_s_error_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMMOE_EXIT_FILE", str(tmp_path / "code"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not exit_codes.ended_for_good()
    exit_codes.record(exit_codes.FAULT)
    assert not exit_codes.ended_for_good()
    exit_codes.record(exit_codes.USER_ERROR)
    assert exit_codes.ended_for_good()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not exit_codes.ended_for_good()


@pytest.mark.parametrize(("code", "rank", "kept"), [(76, 0, False), (1, 0, False), (2, 0, True), (76, 1, True)])
def test_the_first_process_of_a_start_clears_the_code_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, rank: int, kept: bool
) -> None:
    """A hang that a restart fixed must not set the exit code hours later; an error of a user ends all starts."""
    monkeypatch.setenv("MMMOE_EXIT_FILE", str(tmp_path / "code"))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    exit_codes.forget_earlier()
    exit_codes.record(code)
    exit_codes.forget_earlier()
    assert (tmp_path / "code").exists() == kept


def test_the_command_line_clears_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").write_text("76\n")
    monkeypatch.setenv("MMMOE_EXIT_FILE", str(tmp_path / "code"))
    monkeypatch.setattr("sys.argv", ["mmmoe", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert not (tmp_path / "code").exists()


def test_ranks_of_a_machine_tell_the_same_error_once_and_others_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exit_codes, "FIRST_RANK_SECONDS", 0.0)
    for rank, attempt, error in ((0, 0, "a"), (1, 0, "a"), (2, 0, "b"), (3, 0, "a"), (1, 1, "a")):
        folder = tmp_path / f"attempt_{attempt}" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("RANK", str(rank + 8))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        exit_codes.tell(ValueError(error))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/null/1/error.json")
    exit_codes.tell(ValueError("a"))
    told = capsys.readouterr().err.splitlines()
    assert told == ["mmmoe: rank 8: a", "mmmoe: rank 10: b", "mmmoe: rank 9: a", "mmmoe: rank 9: a"]


def test_training_elsewhere_than_on_linux_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="training runs on Linux, and this is darwin"):
        cli.train(Path("run.yaml"))


def test_an_output_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a write fails or the last flush; where the reader of a pipe has ended, nothing is said."""
    monkeypatch.delenv("MMMOE_EXIT_FILE", raising=False)

    def ended(answer: Callable[[], object], stdout: TextIO) -> tuple[object, str]:
        monkeypatch.setattr(cli, "app", answer)
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as raised:
            cli.main()
        stdout.close()
        return raised.value.code, capsys.readouterr().err

    for size in (10, 100_000):  # the buffer has 8 kB
        code, said = ended(lambda size=size: print("x" * size), Path("/dev/full").open("w"))  # noqa: SIM115 (closed there)
        assert code == exit_codes.FAULT
        assert said == (
            "mmmoe: cannot write the output, or a file: No space left on device; make room, or write elsewhere\n"
        )
    reader, writer = os.pipe()
    os.close(reader)
    assert ended(lambda: print("x"), os.fdopen(writer, "w")) == (exit_codes.FAULT, "")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(cli, "app", lambda: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):  # a bug shows its traceback
        cli.main()
