"""A real Slurm over two simulated hosts: a controller on the first, and a slurmd on each."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster import image
from tests.cluster.hosts import Host
from tests.cluster.training import ROOT, Run, Work, expect, same_losses, until

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
SlurmdTimeout=20
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

    def start_node(self, host: Host) -> None:
        host.start(["slurmd", "-D", "-N", host.name], self.folder / "out.log", **self.variables)

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
        cluster.start_node(host)
    try:
        until(lambda: _idle(cluster), "idle nodes", 60.0)
        yield cluster
    finally:
        for host in made:
            host.kill()


def _idle(cluster: Slurm) -> bool:
    found = cluster.made[0].run(["sinfo", "-h", "-o", "%T %D"], 20.0, **cluster.variables).stdout
    return found.split() == ["idle", str(len(cluster.made))]


def launched(
    cluster: Slurm, run: Run, *arguments: str, profile: Mapping[str, object] | None = None, **options: object
) -> str:
    """The id of a job that mmmoe-launch submits from the first host."""
    file = run.work.folder / f"{run.name}.yaml"
    variables = {"OMP_NUM_THREADS": {"value": "1"}}
    file.write_text(yaml.safe_dump({"slurm": options, "environment": variables, **(profile or {})}))
    _, config, name = run.train()
    command = [str(PYTHON), "-m", "mmmoe_pretrain.launch.submit", config, name, *arguments,
               "--on", "slurm", "--nodes", "2", "--profile", str(file)]  # fmt: skip
    return re.search(r"submitted job (\d+)", cluster.ask(*command))[1]  # type: ignore[index]


def a_job_is_warned_requeues_itself_and_ends_with_the_same_losses(work: Work, made: Sequence[Host]) -> None:
    with slurm(work.folder / "slurm", made) as cluster:
        run, steps = Run(work, "requeued"), "train.steps=120"
        job = launched(cluster, run, steps, time="1", options=["--signal=B:USR1@40"])
        expect("state", cluster.wait_for(job, 900.0), "COMPLETED")
        text = (run.folder / "launch" / f"slurm-{job}.log").read_text()
        expect("saved at the warning", text.count("stopped after saving: back to the queue") >= 1, True)
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


def a_job_goes_on_when_a_failed_node_is_back(work: Work, made: Sequence[Host]) -> None:
    """Slurm itself requeues the job."""
    with slurm(work.folder / "slurm", made) as cluster:
        run = Run(work, "node-failed")
        job = launched(cluster, run)
        run.wait_for_step(6, [])
        made[1].kill()
        until(lambda: "down" in cluster.ask("sinfo", "-h", "-n", made[1].name, "-o", "%T"), "a failed node", 120.0)
        made[1].join()
        cluster.start_node(made[1])
        expect("state", cluster.wait_for(job, 600.0), "COMPLETED")
        same_losses(run)


# No package of Debian has apptainer: a script in its place runs its command line by podman. As apptainer does, it
# hands on the environment except PATH, and leaves the network to the host.
APPTAINER = """\
#!/usr/bin/env bash
set -euo pipefail
[[ $1 == exec && $2 == --nv && $3 == --bind ]]
options=(--rm --pull=never --read-only --network=host --cgroups=disabled --user=0:0 {limits})
for mount in ${{4//,/ }}; do options+=("--volume=$mount"); done
for name in $(compgen -e); do [[ $name == PATH || $name == HOME ]] || options+=("--env=$name"); done
image=$5
shift 5
exec unshare --mount sh -c {cgroups} sh {podman} "${{options[@]}}" "$image" "$@"
"""


def a_job_in_a_container_is_checked_saves_and_requeues_itself(work: Work, made: Sequence[Host]) -> None:
    image.make_image(work)
    stand_in = work.folder / "bin" / "apptainer"
    stand_in.parent.mkdir(exist_ok=True)
    podman = ["podman", *image.storage(work), "--cgroup-manager=cgroupfs", "--runtime=crun", "run"]
    stand_in.write_text(
        APPTAINER.format(
            cgroups=shlex.quote(image.CGROUPS), podman=shlex.join(podman), limits=shlex.join(image.LIMITS)
        )
    )
    stand_in.chmod(0o755)
    profile = {
        "image": image.IMAGE,
        "mounts": [f"{work.folder}:{work.folder}"],
        "environment": {
            "PATH": {"value": f"{stand_in.parent}:{os.environ['PATH']}"},
            "OMP_NUM_THREADS": {"value": "1"},
        },
    }
    with slurm(work.folder / "slurm", made) as cluster:
        run = Run(work, "contained")
        job = launched(cluster, run, "--preflight", profile=profile)
        run.wait_for_step(6, [])
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
        expect("state", cluster.wait_for(job, 600.0), "COMPLETED")
        text = (run.folder / "launch" / f"slurm-{job}.log").read_text()
        expect("saved at the signal", text.count("stopped after saving: back to the queue"), 1)
        expect("checked at each start", text.count("\n0 failed, "), 2)
        same_losses(run)


CASES = {
    "Slurm: warned, saved, requeued, the same losses": a_job_is_warned_requeues_itself_and_ends_with_the_same_losses,
    "Slurm: an error of the config does not requeue": an_error_of_the_config_does_not_requeue,
    "Slurm: a failed node comes back: the job goes on": a_job_goes_on_when_a_failed_node_is_back,
    "Slurm: in a container: checked, saved, requeued": a_job_in_a_container_is_checked_saves_and_requeues_itself,
}
