"""One machine of many: what its variables must say, how the others reach it, and when it ends by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from mmmoe_pretrain import exit_codes, launcher
from mmmoe_pretrain.launcher import Nodes
from tests.distributed import free_port
from tests.launch.test_torchrun import ROOT, SCRIPT, ends_saved, launched, run_of, trained, wait_until
from tests.train.faulty import events

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


def test_nodes_come_from_the_environment() -> None:
    assert Nodes.of({}) == Nodes()
    assert Nodes.of({"NNODES": "1", "NODE_RANK": "x", "MASTER_ADDR": "left over"}) == Nodes()
    assert Nodes.of({**TWO, "MASTER_PORT": "", "JOIN_TIMEOUT": "90"}) == Nodes(2, 1, "10.0.0.1", 29500, 90)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"NNODES": "two"}, "NNODES is two; set it to the number of machines"),
        ({"NNODES": "0"}, "NNODES is 0; set it to the number of machines"),
        ({"NODE_RANK": ""}, "NODE_RANK is not set; set it to the number of this machine"),
        ({"NODE_RANK": "2"}, "NODE_RANK is 2, and NNODES is 2: set it to 0 to 1, once each"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set; set it on all 2 machines"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is -1; set it to a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; set it to a port that is free on 10.0.0.1, from 1 to"),
        ({"JOIN_TIMEOUT": "1_0"}, "JOIN_TIMEOUT is 1_0; set it to a number of seconds"),
    ],
)
def test_wrong_variables_are_named_with_a_remedy(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nodes.of({**TWO, **changed})


def test_arguments_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "--standalone" in launcher.arguments(Nodes(), 2, 3, "")
    found = " ".join(launcher.arguments(Nodes.of(TWO), 8, 3, "10.0.0.2"))
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id mmmoe" in found
    assert "is_host=0,join_timeout=600 --local-addr 10.0.0.2 --nproc-per-node 8 --max-restarts 3" in found


def test_the_address_and_interface_of_a_machine_are_those_of_its_route_to_node_0() -> None:
    assert launcher.own_address(Nodes(2, 1, "127.0.0.1")) == "127.0.0.1"
    assert launcher.interface_of("127.0.0.1") == "lo"
    assert launcher.interface_of("203.0.113.7") == ""
    with pytest.raises(ValueError, match=r"no way from this machine to MASTER_ADDR nowhere\.invalid"):
        launcher.own_address(Nodes(2, 1, "nowhere.invalid"))
    with pytest.raises(ValueError, match=r"no way from this machine to MASTER_ADDR a\.\.b \("):
        launcher.own_address(Nodes(2, 1, "a..b"))
    assert launcher.is_own("localhost")
    assert not launcher.is_own(launcher.ANYWHERE)


def test_a_machine_waits_for_node_0_until_it_is_asked_to_stop(tmp_path: Path) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        nodes = Nodes(2, 1, "127.0.0.1", listener.getsockname()[1], join=0)
        with pytest.raises(TimeoutError, match=r"node 0 at 127\.0\.0\.1:\d+ does not listen \(Connection refused\)"):
            launcher.wait_for(nodes, None)
        with pytest.raises(TimeoutError, match=r"node 0 at a\.\.b:1 does not listen \("):
            launcher.wait_for(Nodes(2, 1, "a..b", 1, join=0), None)
        listener.listen()
        assert launcher.wait_for(nodes, tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert not launcher.wait_for(nodes, tmp_path / "stop")


GUARDED = """
import os, subprocess, sys, time
from mmmoe_pretrain.launcher import Guard, Nodes
worker = subprocess.Popen(["sleep", "1"])  # which is not waited for: it stays as a zombie
Guard(Nodes(2, 1, "host", 1), seconds=0.5, tick=0.1).start()
time.sleep(30)
"""


def test_a_machine_whose_workers_have_ended_does_not_wait_for_a_node_0_that_is_gone(tmp_path: Path) -> None:
    """Three machines at once, each with what its ranks have recorded."""
    (tmp_path / "hung").write_text(f"{exit_codes.HUNG}\n")
    (tmp_path / "done").write_text("0\n")
    begun = time.monotonic()
    guarded = {
        name: subprocess.Popen(
            [sys.executable, "-c", GUARDED], stderr=subprocess.PIPE, text=True,
            env={**os.environ, exit_codes.EXIT_FILE: str(tmp_path / name), "PYTHONPATH": str(ROOT)},
        )
        for name in ("nothing", "hung", "done")
    }  # fmt: skip
    told = {name: process.communicate()[1] for name, process in guarded.items()}
    assert 1.0 < time.monotonic() - begun < 15.0
    codes = {name: process.returncode for name, process in guarded.items()}
    assert codes == {"nothing": exit_codes.FAULT, "hung": exit_codes.FAULT, "done": 0}
    assert ["no answer from node 0 at host:1" in text for text in told.values()] == [True, True, False]


@pytest.mark.timeout(60)
def test_a_machine_that_waits_for_the_others_ends_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    """Its wait is over before the machine looks, or longer than the test."""
    with ExitStack() as stack:
        scripts = []
        for join in ("2", "600"):
            port = free_port()
            variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            scripts.append((stack.enter_context(waiting(tmp_path, JOIN_TIMEOUT=join, **variables)), port))
        for script, port in scripts:
            asked = stack.enter_context(closing(socket.socket()))
            wait_until(lambda asked=asked, port=port: asked.connect_ex(("127.0.0.1", port)) == 0, script)
            script.send_signal(signal.SIGTERM)
        assert [script.wait(30) for script, _ in scripts] == [exit_codes.STOPPED] * 2


@contextmanager
def waiting(folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script with a command that never begins; at the end nothing of it is left."""
    script = subprocess.Popen([SCRIPT, "1", "train", str(folder)], env={**os.environ, **variables})
    try:
        yield script
    finally:
        script.kill()
        script.wait()


PARENT = """
import os, subprocess, sys, time
child = "from mmmoe_pretrain import exit_codes; exit_codes.end_with_parent(); print('ready', flush=True); "
subprocess.Popen([sys.executable, "-c", child + "import time; time.sleep(60)"])
time.sleep(60)
"""


def test_what_a_killed_parent_started_ends_as_well() -> None:
    """The end of the child closes the pipe."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read() == ""
    parent.wait()


@pytest.mark.timeout(240)
def test_a_signal_to_one_machine_of_two_saves_the_run_on_both(tmp_path: Path, tiny_data: Path) -> None:
    """Both are this one, which has one address."""
    config = run_of(tmp_path, tiny_data)
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        launched(config, workers=1, NODE_RANK="1", **variables) as other,
        launched(config, workers=1, NODE_RANK="0", **variables) as first,
    ):
        wait_until(lambda: trained(config) >= 2, first)
        other.send_signal(signal.SIGTERM)
        assert [script.wait(60) for script in (first, other)] == [75, 75]
    ends_saved(config, "SIGTERM")
    assert not events(config, "resumed")
