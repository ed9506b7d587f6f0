"""The launcher with a real torchrun: signals reach training, its codes come back, a dead rank is replaced."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.train.faulty import config_in, events, losses, steps_of

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun.sh")
MARK = "MMMOE_TEST_FOLDER"


@contextmanager
def launched(
    config: RunConfig, *arguments: str, workers: int = 2, terminal: int | None = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The script with its workers, on a terminal or a log; at the end nothing of it is left."""
    path = Path(config.runs_dir) / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    run_config.dump(config, path)
    log = path.with_suffix(".log").open("a+")
    process = subprocess.Popen(
        [*(["setsid", "--ctty"] * (terminal is not None)), SCRIPT, str(workers), "train", str(path), *arguments],
        stdin=terminal, stdout=log if terminal is None else terminal, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, MARK: config.runs_dir, **environment},
    )  # fmt: skip
    try:
        yield process
    except BaseException:
        log.seek(0)
        print(log.read()[-4000:])
        raise
    finally:
        for pid in processes(config):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()


def processes(config: RunConfig, rank: int | None = None) -> list[int]:
    """Everything that the script started, or the worker of a rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"{MARK}={config.runs_dir}".encode()} | ({f"RANK={rank}".encode()} if rank is not None else set())
        if wanted <= set(variables):
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 80.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def trained(config: RunConfig) -> int:
    """The steps in the log, without a line that is being written."""
    path = config.run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def beside_python(folder: Path, shell: str) -> tuple[Path, dict[str, str]]:
    """A copy of the script beside no virtual environment, and the variables with which ``shell`` is its python."""
    script, python = folder / "launch" / "torchrun.sh", folder / "python"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    python.write_text(shell)
    python.chmod(0o755)
    return script, {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def run_of(root: Path, tiny_data: Path, steps: int = 10_000) -> RunConfig:
    """At a learning rate that does not depend on the number of steps."""
    return config_in(root, tiny_data, train={"steps": steps}, checkpoint={"every": 5},
                     optimizer={"learning_rate": 3e-3, "schedule": "constant"})  # fmt: skip


@pytest.mark.timeout(240)
def test_a_killed_rank_is_replaced_and_a_signal_saves_the_run_and_asks_for_a_new_start(
    tmp_path: Path, tiny_data: Path
) -> None:
    config = run_of(tmp_path / "killed", tiny_data)
    with launched(config, "--overwrite") as process:  # which must not replace what the first start did
        wait_until(lambda: trained(config) >= 8, process)
        for pid in processes(config, rank=1):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: events(config, "resumed") and trained(config) >= 12, process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # again, as impatient schedulers do
        assert process.wait(60) == 75
    (resumed,) = events(config, "resumed")
    assert resumed["step"] >= 5
    last = ends_saved(config, "SIGTERM")
    assert steps_of(config) == list(range(1, last + 1))
    straight = run_of(tmp_path / "straight", tiny_data, steps=last)
    run_ranks(2, train, straight)
    np.testing.assert_array_equal(losses(config), losses(straight))


def ends_saved(config: RunConfig, reason: str) -> int:
    """The step of the last checkpoint, after a stop for ``reason``."""
    latest = store.find_latest(config.checkpoint_root)
    assert latest is not None
    store.verify(latest)
    end = events(config)[-1]
    assert (end["event"], end["step"], end["reason"]) == ("preempted", latest.step, reason)
    return latest.step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_save_the_run_as_well(tmp_path: Path, tiny_data: Path, number: signal.Signals) -> None:
    config = run_of(tmp_path, tiny_data)
    with launched(config) as process:
        wait_until(lambda: trained(config) >= 2, process)
        if number == signal.SIGUSR1:  # as Slurm's --signal without B: and scancel do it: to every process
            for pid in processes(config):
                os.kill(pid, number)
        else:  # once: a second Ctrl-C would end it unsaved
            process.send_signal(number)
        assert process.wait(60) == 75
    ends_saved(config, number.name)


@pytest.mark.slow
def test_an_error_that_no_restart_fixes_is_not_tried_again(tmp_path: Path, tiny_data: Path) -> None:
    config = run_of(tmp_path, tiny_data, steps=4)
    with launched(config, "train.global_batch_size=9", "train.num_microbatches=2") as process:
        assert process.wait(60) == 2
    text = (Path(config.runs_dir) / "run.log").read_text()
    assert 1 <= text.count("train.global_batch_size 9 does not divide") <= 2, "once a rank"
    assert not config.run_dir.exists()


@pytest.mark.slow
def test_a_rank_killed_in_the_last_save_is_replaced(tmp_path: Path, tiny_data: Path) -> None:
    config = run_of(tmp_path, tiny_data, steps=6)
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
        "    from functools import partial\n"
        "    from tests.train.faulty import killed_in_save\n"
        "    killed_in_save(6, rank=1)\n"
    )
    with launched(config, PYTHONPATH=f"{tmp_path / 'faults'}:{ROOT}") as process:
        assert process.wait(90) == 0
    assert [event["step"] for event in events(config, "resumed")] == [5]
    assert steps_of(config) == list(range(1, 7))


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_the_run(tmp_path: Path, tiny_data: Path) -> None:
    config = run_of(tmp_path, tiny_data)
    main, side = os.openpty()
    with launched(config, terminal=side) as process:
        os.close(side)
        wait_until(lambda: trained(config) >= 2, process)
        os.close(main)
        assert process.wait(60) == 75
    ends_saved(config, "SIGHUP")


def test_a_signal_just_before_the_end_does_not_hide_how_it_ended(tmp_path: Path) -> None:
    """torchrun ends while the trap of a signal still runs: the script waits for a reader of its output."""
    script, environment = beside_python(tmp_path, "#!/bin/sh\ntouch here\nsleep 0.3\nexit 7\n")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    process = subprocess.Popen([script, "1", "train"], stderr=writer, cwd=tmp_path, env=environment)
    os.close(writer)
    try:
        wait_until((tmp_path / "here").exists, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None, "its output must wait"
        while os.read(reader, 1 << 16):
            pass
        assert process.wait(20) == 7
    finally:
        process.kill()
        os.close(reader)


def test_a_torchrun_that_is_killed_is_a_failure(tmp_path: Path) -> None:
    script, environment = beside_python(tmp_path, "#!/bin/sh\nkill -KILL $$\n")
    result = subprocess.run([script, "1", "train"], text=True, capture_output=True, env=environment, check=False)
    assert result.returncode == 1
    assert "torchrun was killed (exit code 137)" in result.stderr


def test_the_code_is_the_scripts_and_not_that_of_the_working_folder(tmp_path: Path) -> None:
    """A job of mmmoe-launch runs a copy of the code, and its working folder is the checkout."""
    (tmp_path / "mmmoe_pretrain").mkdir()
    (tmp_path / "mmmoe_pretrain" / "__init__.py").write_text("raise SystemExit('the code of the working folder')")
    result = subprocess.run([SCRIPT, "1", "train", "nowhere.yaml"], cwd=tmp_path, text=True, capture_output=True,
                            check=False)  # fmt: skip
    assert "mmmoe: rank 0: no config at nowhere.yaml" in result.stderr
    assert result.returncode == 2


def test_a_torchrun_that_is_stopped_may_go_on_and_the_script_be_edited(tmp_path: Path) -> None:
    """As a debugger does it."""
    script, environment = beside_python(tmp_path, "#!/bin/sh\necho $$ > pid\nmv pid stopped\nkill -STOP $$\nexit 7\n")
    process = subprocess.Popen([script, "1", "train"], text=True, cwd=tmp_path, env=environment)
    try:
        wait_until((tmp_path / "stopped").exists, process)
        time.sleep(1.5)  # it looks once a second
        assert process.poll() is None
        (tmp_path / "launch" / "torchrun.sh").write_text("exit 9\n" * 1000)  # by an editor, in place
        os.kill(int((tmp_path / "stopped").read_text()), signal.SIGCONT)
        assert process.wait(20) == 7
    finally:
        process.kill()


def test_too_many_processes_are_refused() -> None:
    result = subprocess.run([SCRIPT, "99999999", "train", "x"], text=True, capture_output=True, check=False)
    assert result.returncode == 2
    assert "99999999 processes are too many" in result.stderr


def test_a_strange_number_of_restarts_is_refused() -> None:
    result = subprocess.run([SCRIPT, "2", "train", "x"], env={**os.environ, "MAX_RESTARTS": "many"}, text=True,
                            capture_output=True, check=False)  # fmt: skip
    assert result.returncode == 2
    assert "MAX_RESTARTS is many; set it to a number of restarts" in result.stderr
