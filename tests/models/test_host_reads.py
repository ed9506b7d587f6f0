"""How often the host waits for an accelerator in a step, counted on a pretended one, where kernels are in bf16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.host_reads import LAYERS

DISPATCH, STEP = "mmmoe_pretrain/moe/dispatch.py:run", "mmmoe_pretrain/engines/base.py:_read"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By case. In a process of its own: a pretended device cannot be taken back."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.host_reads"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["local", "local, drops"])
def test_nothing_is_read_where_experts_are_local(found: dict[str, Any], case: str) -> None:
    assert found[case]["reads"] == {}


def test_one_read_a_layer_where_experts_are_remote(found: dict[str, Any]) -> None:
    assert found["remote"]["reads"] == {DISPATCH: LAYERS}


@pytest.mark.parametrize("case", ["local", "local, drops", "remote"])
def test_a_step_reads_its_results_once_and_copies_from_pinned_memory(found: dict[str, Any], case: str) -> None:
    assert found[case]["reads of a step"] == {STEP: 1}
    assert sum(found[case]["waits"].values()) == 0 and found[case]["copies"] > 0


def test_a_planted_read_and_a_planted_copy_are_found(found: dict[str, Any]) -> None:
    assert sum(found["planted"]["reads"].values()) == sum(found["planted"]["waits"].values()) == 1


def test_the_next_microbatch_is_copied_on_a_stream_of_its_own_while_the_first_is_used(found: dict[str, Any]) -> None:
    once = ["on copies", "copy", "compute waits for copies", "memory kept", "used"]
    assert found["ahead"] == once + once
