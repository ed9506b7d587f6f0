"""A run as a job of Slurm: ``launch/slurm.sbatch`` with the options of a profile."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain.launch.profile import Profile
from mmmoe_pretrain.launch.snapshot import Snapshot, search_path

SECONDS = 60  # that a command of Slurm may take
SCRIPT = Path("launch") / "slurm.sbatch"
WRONG_PARTITION = ("partition", "account", "qos")


@dataclass(frozen=True)
class Job:
    """``environment``: what differs from that of the user."""

    command: list[str]
    environment: dict[str, str]
    log: str  # its path; %j is the job's id

    @property
    def text(self) -> str:
        """The line that a user would type."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()),
                         shlex.join(self.command)])  # fmt: skip


def job(
    profile: Profile, name: str, nodes: int, processes: int, snapshot: Snapshot, options: Sequence[str] = ()
) -> Job:
    """``options``: of ``mmmoe train``."""
    own = profile.slurm
    log = str(snapshot.folder.parent).replace("%", "%%") + "/slurm-%j.log"
    of_sbatch = {
        "job-name": name, "nodes": nodes, "chdir": os.getcwd(), "output": log, "export": "ALL",
        "signal": f"B:USR1@{own.warn_seconds}", "partition": own.partition, "account": own.account, "qos": own.qos,
        "time": own.time, "gpus-per-node": own.gpus_per_node, "cpus-per-task": own.cpus_per_task, "mem": own.memory,
        "constraint": own.constraint,
    }  # fmt: skip
    given = [f"--{option}={value}" for option, value in of_sbatch.items() if value is not None]
    environment = {"MMMOE_ROOT": str(snapshot.root)}
    if profile.image:
        run_dir = snapshot.folder.parents[1]
        mounts = [*(profile.mounts or [f"{os.getcwd()}:{os.getcwd()}"]), f"{run_dir}:{run_dir}"]
        environment |= {"CONTAINER_IMAGE": profile.image, "CONTAINER_MOUNTS": ",".join(mounts)}
    else:
        environment["PATH"] = search_path()
    environment |= {variable: its.value for variable, its in profile.environment.items()}
    command = ["sbatch", "--parsable", *given, *own.options, str(snapshot.root / SCRIPT), str(processes)]
    return Job([*command, "train", str(snapshot.config), *options], environment, log)


def submit(submitted: Job) -> str:
    """The id of the job. Raises ValueError with what sbatch said."""
    result = _ask(submitted.command, submitted.environment)
    if result.returncode:
        said = " ".join(result.stderr.split()) or f"it ended with {result.returncode}"
        hint = "; correct slurm in the profile (scontrol show partition tells what a partition allows)"
        if any(word in said.lower() for word in WRONG_PARTITION):
            hint = "; set slurm.partition and slurm.account in the profile (sinfo -s lists the partitions)"
        raise ValueError(f"sbatch refused the job: {said}{hint}")
    number = result.stdout.strip().partition(";")[0]
    if not number.isdecimal():
        raise ValueError(
            f"sbatch named no job: {' '.join(result.stdout.split())[:99]!r}; is it queued? (squeue --me)"
        )
    return number


def state(job_id: str) -> str:
    """RUNNING, PENDING (Resources), ...; empty for a job that has ended."""
    result = _ask(["squeue", "--noheader", "--jobs", job_id, "--format=%T (%r)"], {})
    return result.stdout.strip().removesuffix(" (None)") if result.returncode == 0 else ""


def how_to_follow(job_id: str, log: str) -> list[str]:
    return [
        f"submitted job {job_id}: {state(job_id) or 'ended'}",
        f"  its log:  tail -F {shlex.quote(log.replace('%j', job_id).replace('%%', '%'))}",
        f"  its state:  squeue --jobs={job_id}",
        f"  save and go back to the queue:  scancel --batch --signal=USR1 {job_id}",
        f"  end it:  scancel {job_id}",
    ]


def _ask(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True,
                              errors="replace", timeout=SECONDS, check=False)  # fmt: skip
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} on this machine; submit from a login node of the cluster, or look at what "
            f"would be submitted with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]} gave no answer within {SECONDS} s; is the controller up? (scontrol ping)"
        ) from None
