"""What a job runs: a copy of the code and of the resolved config in the run's folder, so that editing the checkout
while the job is queued, or between its restarts, changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mmmoe_pretrain
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig

PACKAGE = Path(mmmoe_pretrain.__file__).parent  # with data_prep and launch, which are links in a checkout
FOLDER = "launch"  # in the run's folder
PINNED = ("torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Snapshot:
    """RUN/launch/TIME: ``code``, ``config`` and revision.txt."""

    folder: Path

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def root(self) -> Path:
        """The folder that has launch/."""
        return self.code / PACKAGE.name

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    def write(self, config: RunConfig) -> None:
        """Raises ValueError where the folder cannot be written."""
        try:
            shutil.copytree(PACKAGE, self.code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
            run_config.dump(config, self.config)
            (self.folder / "revision.txt").write_text(revision(), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def written(self, config: RunConfig) -> Iterator[None]:
        """``write``, and delete it again where the job is refused."""
        self.write(config)
        try:
            yield
        except ValueError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise


def new(run_dir: Path) -> Snapshot:
    """One that does not exist yet, by the time."""
    return Snapshot(run_dir.resolve() / FOLDER / time.strftime("%Y%m%dT%H%M%S"))


def search_path() -> str:
    """PATH with this Python's folder first: a copy of the code has no environment beside it."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if path.partition(os.pathsep)[0] == own else os.pathsep.join([own, path])


def revision() -> str:
    """The versions, and of a checkout the commit and what differs from it."""
    lines = [f"mmmoe {mmmoe_pretrain.__version__}", *(f"{name} {_version(name)}" for name in PINNED)]
    commit = _git("rev-parse", "HEAD")
    if commit:
        lines += [f"commit {commit.strip()}", _git("diff", "HEAD")]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _git(*arguments: str) -> str:
    if not (PACKAGE.parent / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", PACKAGE.parent, *arguments], capture_output=True, text=True, errors="replace", check=False,
            timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
