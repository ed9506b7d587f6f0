"""What a cluster needs to be told, in a YAML file of its own: ``mmmoe-launch --profile cluster.yaml``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from mmmoe_pretrain.config.base import StrictModel, explain
from mmmoe_pretrain.untrusted import read_yaml

FABRIC = re.compile(r"(NCCL|GLOO|UCX|FI|OFI|CUDA|TORCH|RDMA|IB|SHARP|MELLANOX)_")  # variables that need a reason


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must be one line of printable characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Variable(StrictModel):
    """A variable of every process. Those of NCCL and the fabric need a ``reason``: nobody removes them otherwise."""

    value: Line
    reason: Line = ""


class Slurm(StrictModel):
    """Options of sbatch. Times as sbatch takes them, e.g. 1-00:00:00."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time: Line | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int | None = Field(None, ge=1)
    memory: Line | None = None
    constraint: Line | None = None
    warn_seconds: int = Field(180, ge=60)  # before the end: a save must fit in; Slurm may be 60 s early
    options: tuple[Line, ...] = ()  # others, e.g. --exclusive


class Kubernetes(StrictModel):
    """``api``: trainjob (Kubeflow Trainer) or jobset. ``claims``: PersistentVolumeClaim -> where it is mounted."""

    api: Annotated[str, Field(pattern="^(trainjob|jobset)$")] = "trainjob"
    namespace: Line | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    gpu_resource: Line = "nvidia.com/gpu"
    cpu: Line | None = None
    memory: Line | None = None
    shared_memory: Line = "64Gi"
    claims: dict[Line, Line] = Field({"runs": "/runs"})
    node_selector: dict[Line, Line] = Field({})
    queue: Line | None = None  # of Kueue
    grace_seconds: int = Field(180, ge=30)  # a save must fit in
    max_restarts: int = Field(10, ge=0)


class Profile(StrictModel):
    """``image``: of the container; none under Slurm runs in this Python. ``mounts``: FROM:TO, under Slurm."""

    processes_per_node: int | None = Field(None, ge=1)  # gpus_per_node unless set
    image: Line | None = None
    mounts: tuple[Line, ...] = ()
    environment: dict[Name, Variable] = Field({})
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()

    @model_validator(mode="after")
    def _reasons(self) -> Self:
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
