"""A real Slurm over two simulated hosts: a controller on the first, and a slurmd on each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.hosts import Host
from tests.cluster.training import ROOT, Run, Work, expect, until

PYTHON = ROOT / ".venv" / "bin" / "python"
NEEDED = {"slurmctld": "slurm-wlm", "munged": "munge"}
JOB_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
CONFIG = """\
ClusterName=mmm
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=10
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """``folder``: its state and logs."""

    folder: Path
    made: Sequence[Host]

    @property
    def variables(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        result = self.made[0].run(command, 60.0, **self.variables, PYTHONPATH=str(ROOT))
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        fields = self.ask("scontrol", "-o", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))

    def wait_for(self, job: str, seconds: float) -> str:
        """The state in which it ended."""
        until(lambda: self.state(job) in JOB_ENDED, f"the end of job {job}", seconds)
        return self.state(job)


@contextmanager
def slurm(folder: Path, made: Sequence[Host]) -> Iterator[Slurm]:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    folder.chmod(0o755)
    nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=2 RealMemory=4000 State=UNKNOWN" for h in made]
    (folder / "slurm.conf").write_text(
        CONFIG.format(first=made[0].name, address=made[0].address, folder=folder, nodes="\n".join(nodes))
    )
    cluster = Slurm(folder, made)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
              f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
              f"--log-file={folder}/munged.log"]  # fmt: skip
    made[0].start(munged, folder / "out.log")
    until((folder / "munge.socket").exists, "munged", 20.0)
    made[0].start(["slurmctld", "-D"], folder / "out.log", **cluster.variables)
    for host in made:
        (folder / f"spool.{host.name}").mkdir()
        host.start(["slurmd", "-D", "-N", host.name], folder / "out.log", **cluster.variables)
    try:
        until(lambda: _idle(cluster), "idle nodes", 60.0)
        yield cluster
    finally:
        for host in made:
            host.kill()


def _idle(cluster: Slurm) -> bool:
    found = cluster.made[0].run(["sinfo", "-h", "-o", "%T %D"], 20.0, **cluster.variables).stdout
    return found.split() == ["idle", str(len(cluster.made))]


def launched(cluster: Slurm, run: Run, *overrides: str, **options: object) -> str:
    """The id of a job that mmmoe-launch submits from the first host."""
    profile = run.work.folder / f"{run.name}.yaml"
    profile.write_text(yaml.safe_dump({"slurm": options, "environment": {"OMP_NUM_THREADS": {"value": "1"}}}))
    _, config, name = run.train()
    command = [str(PYTHON), "-m", "mmmoe_pretrain.launch.submit", config, name, *overrides,
               "--on", "slurm", "--nodes", "2", "--profile", str(profile)]  # fmt: skip
    return re.search(r"submitted job (\d+)", cluster.ask(*command))[1]  # type: ignore[index]


def a_job_is_warned_requeues_itself_and_ends_with_the_same_losses(work: Work, made: Sequence[Host]) -> None:
    with slurm(work.folder / "slurm", made) as cluster:
        run, steps = Run(work, "requeued"), "train.steps=120"
        job = launched(cluster, run, steps, time="1", options=["--signal=B:USR1@40"])
        expect("state", cluster.wait_for(job, 900.0), "COMPLETED")
        text = (run.folder / "launch" / f"slurm-{job}.log").read_text()
        expect("saved at the warning", text.count("stopped after saving; requeued") >= 1, True)
        expect("steps", len(run.losses()), 120)
        straight = Run(work, "straight-120")
        command = [ROOT / "launch" / "torchrun.sh", "2", *straight.train(steps)]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        expect("same losses", run.losses() == straight.losses(), True)


def an_error_of_the_config_does_not_requeue(work: Work, made: Sequence[Host]) -> None:
    with slurm(work.folder / "slurm", made) as cluster:
        run = Run(work, "wrong")
        job = launched(cluster, run, "data.tokenizer=nowhere.model")
        expect("state", cluster.wait_for(job, 120.0), "FAILED")
        time.sleep(2.0)
        expect("exit code", "ExitCode=2:0" in cluster.ask("scontrol", "-o", "show", "job", job), True)
        expect("told", "nowhere.model" in (run.folder / "launch" / f"slurm-{job}.log").read_text(), True)


CASES = {
    "Slurm: warned, saved, requeued, the same losses": a_job_is_warned_requeues_itself_and_ends_with_the_same_losses,
    "Slurm: an error of the config does not requeue": an_error_of_the_config_does_not_requeue,
}
