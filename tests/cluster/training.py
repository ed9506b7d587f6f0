"""Runs over two simulated hosts by launch/torchrun.sh, and what happens to them when a host fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import Host, own_disk, variables

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun.sh")
STEPS = 24
END = 180.0  # seconds within which both hosts' scripts must have ended
JOIN = 45  # seconds that hosts wait for each other; torchrun may take 30 to end a worker


@dataclass
class Work:
    """A folder with the demo's small corpus as shards, its config, and the losses of an undisturbed run. ``base``: a
    folder with the base of the container image, made when it is first needed."""

    folder: Path
    base: Path
    straight: list[dict[str, float]] = field(default_factory=list)

    def make(self) -> None:
        corpus, shards, tokenizer = (self.folder / name for name in ("corpus", "shards", "tokenizer.model"))
        for arguments in (
            ("corpus", "mini", "--out", corpus),
            ("shard", corpus / "manifest.jsonl", "--out", shards, "--image-size", "96", "--audio-rate", "16000"),
            ("tokenizer", corpus / "manifest.jsonl", "--vocab-size", "1024", "--out", tokenizer),
        ):
            command = [ROOT / ".venv" / "bin" / "mmmoe-data", *map(str, arguments)]
            subprocess.run(command, check=True, capture_output=True, env=environment())
        config = yaml.safe_load((ROOT / "configs" / "demo_mini.yaml").read_text())
        config["data"] = {"train": [{"path": str(shards / "train")}], "tokenizer": str(tokenizer)}
        # Runs are compared bit for bit, so none may measure its own library of products.
        config["train"] |= {"steps": STEPS, "log_every": 1, "cpu": {"products": "torch"}}
        config["checkpoint"] = {"every": 4}
        config["parallel"] = {"expert_parallel_size": 2, "timeout_minutes": 1}
        config["faults"] = {"hang_minutes": 0.25}
        config["runs_dir"] = str(self.folder / "runs")
        del config["evaluate"]
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config))
        straight = Run(self, "straight")
        subprocess.run([SCRIPT, "2", *straight.train()], check=True, capture_output=True, env=environment())
        self.straight = straight.losses()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@dataclass
class Run:
    """A run of ``Work`` with a name of its own."""

    work: Work
    name: str

    @property
    def folder(self) -> Path:
        return self.work.folder / "runs" / self.name

    def train(self, *arguments: str) -> list[str]:
        return ["train", str(self.work.folder / "run.yaml"), f"name={self.name}", *arguments]

    def log(self, host: Host) -> Path:
        return self.work.folder / f"{self.name}_{host.name}.log"

    def start(
        self, host: Host, made: Sequence[Host], *arguments: str, before: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        settings = {**variables(made, host.number), "JOIN_TIMEOUT": str(JOIN), "OMP_NUM_THREADS": "1"}
        return host.start([*before, SCRIPT, "1", *self.train(*arguments)], self.log(host), **settings)

    def losses(self) -> list[dict[str, float]]:
        """Of each step."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["losses"] for line in lines if line.endswith("}")]

    def wait_for_step(self, step: int, started: Sequence[subprocess.Popen[bytes]]) -> None:
        def reached() -> bool:
            ended = [process.returncode for process in started if process.poll() is not None]
            assert not ended, f"a script ended with {ended} before step {step}"
            return len(self.losses()) >= step

        until(reached, f"step {step}")


def until(condition: Callable[[], Any], what: str, seconds: float = END) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def codes(started: Sequence[subprocess.Popen[bytes]], seconds: float = END) -> list[int]:
    """The exit codes of scripts, which must all end."""
    until(lambda: all(process.poll() is not None for process in started), "the scripts' end", seconds)
    return [process.wait() for process in started]


def expect(what: str, found: object, wanted: object) -> None:
    assert found == wanted, f"{what}: {found}, not {wanted}"


def same_losses(run: Run) -> None:
    expect(f"losses of {len(run.losses())} steps", run.losses() == run.work.straight, True)


def undisturbed(work: Work, made: Sequence[Host]) -> None:
    run = Run(work, "undisturbed")
    expect("codes", codes([run.start(host, made) for host in made]), [0, 0])
    same_losses(run)


def a_rank_is_killed(work: Work, made: Sequence[Host]) -> None:
    """Both hosts' ranks start again and resume, without help."""
    run = Run(work, "killed-rank")
    started = [run.start(host, made) for host in made]
    run.wait_for_step(6, started)
    worker = next(pid for pid in made[1].pids if is_worker(pid))
    subprocess.run(["kill", "-KILL", str(worker)], check=True)
    expect("codes", codes(started), [0, 0])
    same_losses(run)


def is_worker(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        variables = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"mmmoe_pretrain.cli" in command and b"\0RANK=" in variables


def a_killed_host_comes_back(work: Work, made: Sequence[Host]) -> None:
    """It is started again while the other waits: the run goes on."""
    run = Run(work, "killed-host")
    started = [run.start(host, made) for host in made]
    run.wait_for_step(6, started)
    made[1].kill()
    time.sleep(3.0)
    made[1].join()
    expect("codes", codes([started[0], run.start(made[1], made)]), [0, 0])
    same_losses(run)


def a_killed_host_stays_away(work: Work, made: Sequence[Host]) -> None:
    """The other ends by itself, and a new start of both resumes."""
    for number in (0, 1):
        run = Run(work, f"lost-host-{number}")
        started = [run.start(host, made) for host in made]
        run.wait_for_step(6, started)
        made[number].kill()
        expect("code of the other is a failure", codes([started[1 - number]]) in ([1], [76]), True)
        made[number].join()
        expect("codes", codes([run.start(host, made) for host in made]), [0, 0])
        same_losses(run)


def a_host_is_cut_off(work: Work, made: Sequence[Host]) -> None:
    """In the middle of a step, its processes alive: both end, and a new start of both resumes."""
    run = Run(work, "cut-off")
    started = [run.start(host, made) for host in made]
    run.wait_for_step(6, started)
    made[1].cut()
    found = codes(started)
    expect(f"both failed, {found}", all(code in (1, 76) for code in found), True)
    made[1].join()
    expect("codes", codes([run.start(host, made) for host in made]), [0, 0])
    same_losses(run)


def an_error_of_one_host_ends_all(work: Work, made: Sequence[Host]) -> None:
    """No host waits for the ranks that ended: one has another tokenizer, one cannot even read its config."""
    for name, wrong in (("other-file", "data.tokenizer=nowhere.model"), ("other-config", "train.steps=many")):
        run = Run(work, name)
        began = time.monotonic()
        started = [run.start(made[0], made), run.start(made[1], made, wrong)]
        expect("codes", codes(started), [2, 2])
        expect("within a minute and a half", time.monotonic() - began < 90.0, True)
        expect("told", wrong.partition("=")[2] in run.log(made[1]).read_text(), True)


def a_folder_that_is_not_shared_is_refused(work: Work, made: Sequence[Host]) -> None:
    run = Run(work, "apart")
    disk = own_disk(run.folder.parent, "100m")
    started = [run.start(made[0], made), run.start(made[1], made, before=disk)]
    expect("codes", codes(started), [2, 2])
    for host in made:
        expect("told", f"{run.folder} on {made[1].name} is not the one of rank 0" in run.log(host).read_text(), True)


def a_signal_to_one_host_saves_the_run(work: Work, made: Sequence[Host]) -> None:
    run = Run(work, "signal")
    started = [run.start(host, made) for host in made]
    run.wait_for_step(6, started)
    started[1].send_signal(signal.SIGTERM)  # the script: ip, unshare and sh have replaced themselves by it
    expect("codes", codes(started), [75, 75])
    expect("codes", codes([run.start(host, made) for host in made]), [0, 0])
    same_losses(run)


def the_others_wait_for_node_0(work: Work, made: Sequence[Host]) -> None:
    run = Run(work, "late")
    other = run.start(made[1], made)
    time.sleep(8.0)
    expect("codes", codes([run.start(made[0], made), other]), [0, 0])
    same_losses(run)


CASES: dict[str, Callable[[Work, Sequence[Host]], None]] = {
    "two hosts have the losses of one": undisturbed,
    "a rank of one host is killed: all start again": a_rank_is_killed,
    "a host is killed and started again: the run goes on": a_killed_host_comes_back,
    "a host is killed for good: the other ends": a_killed_host_stays_away,
    "a host is cut off in a step: both end": a_host_is_cut_off,
    "an error of one host ends all, and is not tried again": an_error_of_one_host_ends_all,
    "a run folder that hosts do not share is refused": a_folder_that_is_not_shared_is_refused,
    "a signal to one host saves the run": a_signal_to_one_host_saves_the_run,
    "hosts wait for node 0": the_others_wait_for_node_0,
}
