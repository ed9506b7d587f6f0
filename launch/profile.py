"""What a cluster needs to be told, in a YAML file of its own: ``mmmoe-launch --profile cluster.yaml``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mmmoe_pretrain.config.base import StrictModel, explain
from mmmoe_pretrain.plan.machines import GPUS
from mmmoe_pretrain.untrusted import read_yaml

FABRIC = re.compile(r"(NCCL|GLOO|UCX|FI|OFI|CUDA|TORCH|RDMA|IB|SHARP|MELLANOX)_")  # variables that need a reason
EARLY = 60  # seconds that Slurm may warn before it was asked to
OWN = {"MMMOE_ROOT", "NNODES", "NODE_RANK", "MASTER_ADDR", "CONTAINER_IMAGE", "CONTAINER_MOUNTS"}  # of a job


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must be one line of printable characters")
    return text


def _known_gpu(name: str) -> str:
    if name not in GPUS:
        raise ValueError(f"gpu {name!r} is not a known GPU; use one of {', '.join(GPUS)}, or leave it out")
    return name


def _text(value: object) -> object:
    if isinstance(value, bool | int | float):
        why = "it must be text: put it in quotes (YAML reads 1:00:00 as 3600, and no as false)"
        raise PydanticCustomError("text", "{why}", {"why": why})
    return value


Line = Annotated[str, BeforeValidator(_text), AfterValidator(_one_line)]
Quantity = Annotated[Line, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # 96, 1000Gi
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Variable(StrictModel):
    """A variable of every process. Those of NCCL and the fabric need a ``reason``: nobody removes them otherwise."""

    value: Line
    reason: Line = ""


class Slurm(StrictModel):
    """Options of sbatch. ``time`` as sbatch takes it, e.g. 1-00:00:00."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time: Line | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int | None = Field(None, ge=1)
    memory: Quantity | None = None
    constraint: Line | None = None
    warn_seconds: int = Field(180, ge=60)  # before the end: a save must fit in; Slurm may be 60 s early
    options: tuple[Line, ...] = ()  # others, e.g. --exclusive

    @model_validator(mode="after")
    def _warns_before_the_end(self) -> Self:
        own = any(option.startswith("--signal") for option in self.options)
        if self.time is not None and not own and self.warn_seconds + EARLY >= seconds_of(self.time):
            raise ValueError(
                f"slurm.time {self.time} leaves no time to train: the warning comes warn_seconds "
                f"{self.warn_seconds} and up to {EARLY} s more before the end; raise time, or lower warn_seconds"
            )
        return self


def seconds_of(time: str) -> float:
    """Seconds of a time limit of sbatch: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED. Raises ValueError."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ValueError(
            f"slurm.time {time!r} is not one of sbatch's; e.g. 1:30:00 (hours:minutes:seconds) or 2-12 (days-hours)"
        )
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


class Kubernetes(StrictModel):
    """``api``: trainjob (Kubeflow Trainer) or jobset. ``claims``: PersistentVolumeClaim -> where it is mounted."""

    api: Annotated[str, Field(pattern="^(trainjob|jobset)$")] = "trainjob"
    namespace: Line | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    gpu_resource: Line = "nvidia.com/gpu"
    cpu: Quantity | None = None
    memory: Quantity | None = None
    shared_memory: Quantity = "64Gi"
    claims: dict[Line, Line] = Field({"runs": "/runs"})
    queue: Line | None = None  # of Kueue
    pod: dict[str, Any] = Field({})  # more of the pod's spec: nodeSelector, imagePullSecrets, ...
    container: dict[str, Any] = Field({})  # more of the container's: envFrom, securityContext, ...
    grace_seconds: int = Field(180, ge=30)  # a save must fit in
    max_restarts: int = Field(10, ge=0)


class Profile(StrictModel):
    """``image``: of the container; none under Slurm runs in this Python. ``mounts``: FROM:TO, under Slurm. ``gpu``:
    their kind; a run that does not fit its memory is refused."""

    gpu: Annotated[str, AfterValidator(_known_gpu)] | None = None
    processes_per_node: int | None = Field(None, ge=1)  # gpus_per_node unless set
    image: Line | None = None
    mounts: tuple[Line, ...] = ()
    environment: dict[Name, Variable] = Field({})
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()

    @model_validator(mode="after")
    def _reasons(self) -> Self:
        if own := sorted(OWN & self.environment.keys()):
            raise ValueError(f"environment.{own[0]} is set by mmmoe-launch for each job; leave it out")
        bare = [name for name, its in self.environment.items() if FABRIC.match(name) and not its.reason.strip()]
        if bare:
            raise ValueError(
                f"environment.{bare[0]} has no reason; say why this cluster needs it: "
                f"{bare[0]}: {{value: {self.environment[bare[0]].value!r}, reason: ...}}"
            )
        return self


def load(path: Path) -> Profile:
    """Raises ValueError with all that is wrong in the file."""
    if not path.is_file():
        raise ValueError(f"no profile at {path}")
    values: Any = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a mapping of keys")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(explain(error))}") from None
