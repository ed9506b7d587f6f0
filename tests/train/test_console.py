"""Console output: plain lines without a terminal, a bar on one, nothing on other ranks."""

from __future__ import annotations

import dataclasses
import io
import os

import pytest

from mmmoe_pretrain.train.console import Console, describe, short, task_losses
from mmmoe_pretrain.train.metrics import SampleCounts, StepRecord

RECORD = StepRecord(
    step=100,
    losses={
        "total": 3.21,
        "contrastive/image-text": 2.0,
        "contrastive/audio-text": 0.75,
        "captioning": 0.41,
        "aux/balance": 0.05,
    },
    learning_rate=1e-3,
    grad_norm=0.8,
    tokens=24_690,
    seconds=2.0,
    data_seconds=0.1,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_line_without_a_terminal() -> None:
    stream = io.StringIO()
    with Console(total_steps=1500, start_step=90, stream=stream) as console:
        console.update(RECORD)
    # 10 steps in 2 s, so the 1,400 steps left take 280 s.
    assert stream.getvalue() == (
        "step 100/1500  loss 3.21 (contrastive 2.75, captioning 0.41)  lr 1.0e-03  grad 0.8  12.3k tok/s  eta 4:40\n"
    )


def test_the_time_left_follows_the_latest_speed_slowly() -> None:
    stream = io.StringIO()
    with Console(total_steps=200, start_step=90, stream=stream) as console:
        console.update(RECORD)  # 0.2 s a step
        console.update(dataclasses.replace(RECORD, step=110, seconds=12.0))  # 1.2 s a step
    # 0.2 + 0.2 * (1.2 - 0.2) = 0.4 s a step, 90 steps left.
    assert stream.getvalue().splitlines()[-1].endswith("eta 0:36")


def test_other_ranks_are_silent() -> None:
    stream = Terminal()
    with Console(total_steps=1500, enabled=False, stream=stream) as console:
        console.update(RECORD)
        console.say("checkpoint written")
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Console(total_steps=1500, stream=stream) as console:
        console.update(RECORD)
        console.say("checkpoint written [step 100]")
    shown = stream.getvalue()
    assert "100/1500" in shown
    assert "contrastive 2.75" in shown
    assert "checkpoint written [step 100]" in shown


def test_waiting_for_data_and_bad_samples_are_named_when_they_matter() -> None:
    quiet = describe(RECORD)
    assert "data wait" not in quiet and "bad" not in quiet
    loud = describe(dataclasses.replace(RECORD, data_seconds=0.5, samples=SampleCounts(bad=3)))
    assert loud.endswith("data wait 25%  bad 3")


def test_a_single_objective_is_not_repeated() -> None:
    assert "(" not in describe(dataclasses.replace(RECORD, losses={"total": 1.0, "captioning": 1.0}))


def test_task_losses_add_up_the_terms_of_an_objective() -> None:
    assert task_losses(RECORD.losses) == {"contrastive": 2.75, "captioning": 0.41}


@pytest.mark.parametrize(("value", "text"), [(12.4, "12"), (12_345, "12.3k"), (1_500_000, "1.5M"), (2e9, "2.0G")])
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_was_closed_ends_no_run(terminal: bool) -> None:
    main, side = os.openpty()
    if not terminal:
        os.close(side)
        reader, side = os.pipe()
        os.close(reader)
    with os.fdopen(side, "w") as stream:
        with Console(total_steps=200, stream=stream) as console:
            console.update(RECORD)
            os.close(main)
            console.say("checkpoint written")
            console.update(RECORD)
        stream.write("the buffer's last words")  # as the process ends
