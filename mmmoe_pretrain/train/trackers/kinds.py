"""The trackers by kind: a small class each, which only the process of the tracker makes.

A tracker sends ``Line``s in rising steps and may raise whatever its library raises; a line that failed is sent again.
Libraries are imported by name, since they are optional.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MLFLOW_BATCH = 1000  # metrics of a request, MLflow's limit
MLFLOW_PARAMS, MLFLOW_VALUE = 100, 500  # parameters of a request, and letters of a value


@dataclass(frozen=True)
class Line:
    """A record: ``values`` by TensorBoard's names; ``time`` in seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """What a tracker is told of the run. ``id``: of the tracker's own run, of an earlier start; else empty."""

    name: str
    folder: Path  # RUN/trackers
    settings: Mapping[str, Any]  # its section of the config
    config: Mapping[str, Any]  # of the run
    id: str
    new_id: str  # for those that let a user choose it


class Tracker(Protocol):
    id: str

    def log(self, line: Line) -> None: ...

    def close(self, finished: bool) -> None:
        """``finished``: all steps are done; otherwise the run may go on later, under the same id."""


class Wandb:
    def __init__(self, subject: Subject) -> None:
        wandb = importlib.import_module("wandb")
        self.id = subject.id or subject.new_id
        self._run = wandb.init(
            project=subject.settings["project"],
            entity=subject.settings["entity"],
            mode=subject.settings["mode"],
            name=subject.name,
            id=self.id,
            resume="allow",
            dir=str(subject.folder),
            config=dict(subject.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, line: Line) -> None:
        self._run.log(line.values, step=line.step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """An attempt takes seconds where the server is gone, not MLflow's minutes: the relay tries again."""

    def __init__(self, subject: Subject) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = str(subject.settings["uri"])
        if "://" not in uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it is asked for
        self._client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
        self._entities = importlib.import_module("mlflow.entities")
        self._config: Mapping[str, Any] = {}  # that is still to be sent: a failure must not make a second run
        if subject.id:
            self.id = subject.id
            self._client.update_run(self.id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(subject.settings["experiment"])
        experiment = found.experiment_id if found else self._client.create_experiment(subject.settings["experiment"])
        self.id = self._client.create_run(experiment, run_name=subject.name).info.run_id
        self._config = subject.config

    def log(self, line: Line) -> None:
        self._log_config()
        at, metric = round(1000 * line.time), self._entities.Metric
        metrics = [metric(name, value, at, line.step) for name, value in line.values.items()]
        for part in _parts(metrics, MLFLOW_BATCH):
            self._client.log_batch(self.id, metrics=part)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")

    def _log_config(self) -> None:
        parameters = [self._entities.Param(key, value[:MLFLOW_VALUE]) for key, value in flat(self._config)]
        for part in _parts(parameters, MLFLOW_PARAMS):
            self._client.log_batch(self.id, params=part)
        self._config = {}


class Trackio:
    def __init__(self, subject: Subject) -> None:
        if folder := subject.settings["folder"]:
            os.environ["TRACKIO_DIR"] = str(folder)  # which trackio reads as it is imported
        self.id = subject.id or subject.new_id
        self._run = importlib.import_module("trackio").init(
            project=subject.settings["project"],
            name=f"{subject.name}-{self.id}",  # by which trackio finds the run again
            resume="allow",
            config=dict(subject.config),
            embed=False,
        )

    def log(self, line: Line) -> None:
        self._run.log(dict(line.values), step=line.step)

    def close(self, finished: bool) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Kind:
    make: Callable[[Subject], Tracker]
    module: str
    package: str  # that pip installs
    extra: str  # of mmmoe, which has it


KINDS = {
    "wandb": Kind(Wandb, "wandb", "wandb", "trackers"),
    "mlflow": Kind(Mlflow, "mlflow", "mlflow-skinny", "trackers"),
    "trackio": Kind(Trackio, "trackio", "trackio", "trackio"),
}  # kind of config/watching.py -> how records get there


def check_installed(kinds: Sequence[str]) -> None:
    """Raises ValueError that names those of ``kinds`` whose library is not there, and how to install it."""
    missing = [name for name in kinds if not is_installed(KINDS[name].module)]
    if missing:
        keys, found = ", ".join(f"trackers.{name}" for name in missing), [KINDS[name] for name in missing]
        extras = ",".join(dict.fromkeys(kind.extra for kind in found))
        packages, pronoun = " ".join(kind.package for kind in found), "it" if len(missing) == 1 else "them"
        raise ValueError(
            f"{keys}: not installed on the machine of rank 0; pip install 'mmmoe[{extras}]', or {packages} alone, or "
            f"leave {pronoun} out of the config"
        )


def is_installed(module: str) -> bool:
    """A folder without code is no library: W&B writes one called wandb."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[at : at + size] for at in range(0, len(values), size))
