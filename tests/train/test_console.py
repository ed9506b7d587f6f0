"""Console output: plain lines without a terminal, a bar on one, nothing on other ranks."""

from __future__ import annotations

import dataclasses
import io
import os

import pytest

from mmmoe_pretrain.train.console import Console, describe, short
from mmmoe_pretrain.train.metrics import SampleCounts, StepRecord
from tests.train.test_metrics import layer_routing

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


def test_plain_lines_without_a_terminal_tell_a_time_left_that_follows_the_latest_speed_slowly() -> None:
    stream = io.StringIO()
    with Console(total_steps=1500, stream=stream) as console:
        console.set_step(90)
        console.update(RECORD)  # 10 steps in 2 s, so the 1,400 steps left take 280 s
        console.update(dataclasses.replace(RECORD, step=110, seconds=12.0))  # 1.2 s a step
    first, second = stream.getvalue().splitlines()
    assert first == (
        "step 100/1500  loss 3.21 (contrastive 2.75, captioning 0.41, aux 0.05)  lr 1.0e-03  grad 0.8  12.3k tok/s  "
        "eta 4:40"
    )
    assert second.endswith("eta 9:16")  # 0.2 + 0.2 * (1.2 - 0.2) = 0.4 s a step, 1,390 steps left


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


def test_a_line_holds_what_matters() -> None:
    quiet = describe(dataclasses.replace(RECORD, losses={"total": 1.0, "captioning": 1.0}))
    assert not any(word in quiet for word in ("data wait", "bad", "("))  # a single objective is not repeated
    loud = dataclasses.replace(
        RECORD, data_seconds=0.5, samples=SampleCounts(bad=3), memory={"allocated": 2**30, "reserved": 3 * 2**29},
        flops_a_token=1e9, peak_flops=4e13, routing=(layer_routing(), layer_routing(experts=6)),
    )  # fmt: skip
    # 12,345 tokens a second of 1 GFLOP; experts 1, 0 and 2 get 1.5 of an even share of 4, and 2.25 of one of 6.
    assert describe(loud).endswith("12.3TFLOP/s  MFU 31%  load 0-2.2  dead 4  mem 1.5 GiB  data wait 25%  bad 3")


def test_the_first_step_is_told_at_once() -> None:
    stream = io.StringIO()
    with Console(total_steps=1500, stream=stream) as console:
        console.first_step(1, {"total": 2.5, "captioning": 2.0, "aux/z": 0.25, "aux/balance": 0.25}, seconds=12.34)
    assert stream.getvalue() == "step 1/1500  loss 2.5 (captioning 2, aux 0.5)  12.3 s for the first step\n"


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
        stream.write("what is left in the buffer")  # as the process ends
