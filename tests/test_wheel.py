"""The wheel, installed outside of the checkout: its commands answer, a run trains, and a job would be submitted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from tests.train.faulty import config_in

ROOT = Path(__file__).parents[1]
COMMANDS = ("mmmoe_pretrain.cli", "mmmoe_pretrain.data_prep.cli", "mmmoe_pretrain.launch.submit")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git would hand out: no leftovers of an earlier build."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout  # fmt: skip
    for name in listed.decode().split("\0"):
        if name and os.path.lexists(ROOT / name) and not name.startswith(("tests/", "benchmarks/")):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def answers(python: Path, folder: Path, *command: object, **environment: str) -> str:
    result = subprocess.run([python, "-m", *map(str, command)], cwd=folder, env={**os.environ, **environment},
                            capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def check(python: Path, folder: Path, config: Path, **environment: str) -> None:
    for module in COMMANDS:
        assert "Usage" in answers(python, folder, module, "--help", **environment)
    submit = "mmmoe_pretrain.launch.submit"
    line = answers(python, folder, submit, config, "--on", "slurm", "--dry-run", **environment)
    assert "mmmoe_pretrain/launch/slurm.sbatch" in line
    answers(python, folder, submit, config, "train.steps=2", **environment)
    run = run_config.load(config).run_dir
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    assert len(list((run / "launch").iterdir())) == 1, "the copy that it ran"


@pytest.mark.timeout(240)
def test_an_installed_wheel_works_outside_of_the_checkout(wheel: Path, tmp_path: Path, tiny_data: Path) -> None:
    """Beside the packages that the tests have; the next test installs them, too."""
    pip("install", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel)
    assert sorted(path.name for path in (tmp_path / "site").iterdir() if path.is_dir()) == [
        "bin", "mmmoe-0.1.0.dist-info", "mmmoe_pretrain",
    ], "no name that others use"  # fmt: skip
    assert (tmp_path / "site/mmmoe_pretrain/evaluate/routing/page.html").is_file(), "the template of mmmoe routing"
    run_config.dump(config_in(tmp_path, tiny_data), tmp_path / "run.yaml")
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    where = "import mmmoe_pretrain; print(mmmoe_pretrain.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env={**os.environ, **environment},
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert found.startswith(str(tmp_path / "site"))
    check(Path(sys.executable), tmp_path, tmp_path / "run.yaml", **environment)


@pytest.mark.network
@pytest.mark.timeout(900)
def test_an_empty_environment_gets_all_that_a_run_needs(wheel: Path, tmp_path: Path, tiny_data: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
    run_config.dump(config_in(tmp_path, tiny_data), tmp_path / "run.yaml")
    check(python, tmp_path, tmp_path / "run.yaml", PYTHONPATH="")
    answers(python, tmp_path, "mmmoe_pretrain.cli", "train", tmp_path / "run.yaml", "train.steps=2", "name=deepspeed",
            "parallel.engine=deepspeed", PYTHONPATH="")  # fmt: skip
