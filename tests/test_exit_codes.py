"""What a process tells its launcher."""

from pathlib import Path

import pytest

from mmmoe_pretrain import exit_codes


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
