"""Signals request a stop; they do not end the process."""

import os
import signal
import threading
from pathlib import Path

import pytest

from mmmoe_pretrain.train.signals import STOPPING, stop_on_signals


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_asks_to_stop_and_its_handler_is_as_before_behind_it(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_further_signals_do_not_end_a_save_but_a_second_ctrl_c_interrupts() -> None:
    with stop_on_signals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_file_asks_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMMOE_STOP_FILE", str(tmp_path / "stop"))
    with stop_on_signals() as stop:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert not stop.requested  # the launcher is about to write it
        (tmp_path / "stop").write_text("SIGUSR1\n")
        assert stop.reason == "SIGUSR1"


def test_other_threads_than_the_main_one_have_no_handlers() -> None:
    handlers = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            handlers.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM), False]
