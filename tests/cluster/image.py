"""The container image, built by buildah on a bare Debian, and run read-only by podman as a user without a name.

Nothing is pulled: debootstrap makes the base (``--base`` of tests.cluster.run keeps it), and pip installs with this
machine's settings. Each command has its own mounts (unshare), so that none is left. Where overlays do not work:
STORAGE_DRIVER=vfs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import Host
from tests.cluster.training import ROOT, SCRIPT, Work, environment, expect, until

NEEDED = {"buildah": "buildah", "podman": "podman", "crun": "crun", "debootstrap": "debootstrap"}
IMAGE = "localhost/mmmoe:cpu"
USER = 4711
GIB = 2**30
PLACE = "/opt/mmmoe"
LIMITS = ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]  # that a container may have everywhere
# crun of Debian 12 refuses machines that have both versions of cgroups; only these processes see the other view.
CGROUPS = 'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'


def pip_settings() -> dict[str, str]:
    """Of this machine: of its files, and of its environment, which comes last. Without paths of constraints."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        if key.rpartition(".")[2] not in ("constraint", "user", "target", "prefix"):
            found[key.rpartition(".")[2]] = value.strip("'")
    return found


def local_places(settings: dict[str, str]) -> set[Path]:
    """The files and folders of this machine that pip's settings name; of an index, the folder around it."""
    words = (word.removeprefix("file://") for value in settings.values() for word in value.split())
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    return {path.parent if path.is_dir() and len(path.parts) > 3 else path for path in paths}


def storage(work: Work) -> list[str]:
    folder = work.folder / "containers"
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    return [f"--root={folder}/store", f"--runroot={folder}/run", f"--storage-driver={driver}"]


def buildah(work: Work, context: Path, *arguments: str) -> None:
    folder = work.folder / "containers"
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    command = ["unshare", "--mount", "buildah", *storage(work), "bud", f"--signature-policy={policy}",
               "--isolation=chroot", *arguments]  # fmt: skip
    with (folder / "build.log").open("ab") as log:
        result = subprocess.run([*command, str(context)], stdout=log, stderr=log, check=False, timeout=1800,
                                env={**os.environ, "TMPDIR": str(folder / "tmp")})  # fmt: skip
    assert result.returncode == 0, f"{' '.join(command)}: see {folder / 'build.log'} (kept with --keep)"


def make_base(work: Work) -> None:
    """``localhost/base``: a bare Debian with Python, from the folder of ``--base`` if it was made before."""
    archive = work.base / "rootfs.tar"
    if not archive.exists():
        work.base.mkdir(parents=True, exist_ok=True)
        root = work.base / "rootfs"
        shutil.rmtree(root, ignore_errors=True)
        packages = "--include=ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
        subprocess.run(command, check=True, capture_output=True, timeout=1200)
        draft = work.base / "draft.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(draft), "."], check=True)
        draft.rename(archive)
        shutil.rmtree(root)
    (work.base / "Dockerfile").write_text("FROM scratch\nADD rootfs.tar /\n")
    buildah(work, work.base, "-t", "localhost/base")


def make_image(work: Work) -> None:
    """Once for all cases."""
    if (work.folder / "containers" / "made").exists():
        return
    free = shutil.disk_usage(work.folder).free
    assert free > 12 * GIB, f"{work.folder} has {free / GIB:.0f} GiB free; the image needs 12 while it is built"
    make_base(work)
    settings = pip_settings()
    secret = work.folder / "containers" / "pip.conf"
    secret.touch(0o600)
    secret.write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items())]))
    mounts = [f"--volume={place}:{place}:ro" for place in local_places(settings)]
    buildah(work, ROOT, "--network=host", "--target=cpu", "--build-arg=BASE=localhost/base", *mounts,
            f"--secret=id=pip.conf,src={secret}", "-t", IMAGE)  # fmt: skip
    data = work.folder / "image" / "data" / "demo"
    shutil.copytree(work.folder / "shards", data / "mini")
    shutil.copy(work.folder / "tokenizer.model", data / "tokenizer-mini.model")
    runs = work.folder / "image" / "runs"
    runs.mkdir()
    os.chown(runs, USER, USER)
    (work.folder / "containers" / "made").touch()


def inside(work: Work, *command: str) -> list[str]:
    """The command that runs ``command`` in a container: nothing can be written but /tmp and the folder of runs."""
    mounts = [f"--volume={work.folder}/image/data:{PLACE}/data:ro", f"--volume={work.folder}/image/runs:{PLACE}/runs"]
    limits = [*LIMITS, "--network=none", "--cgroups=disabled", "--timeout=600"]
    start = ["podman", *storage(work), "--cgroup-manager=cgroupfs", "--runtime=crun", "run", "--rm", "--pull=never"]
    options = ["--read-only", "--passwd=false", f"--user={USER}:{USER}", *limits, *mounts]
    return ["unshare", "--mount", "sh", "-c", CGROUPS, "sh", *start, *options, IMAGE, *command]


def output(work: Work, *command: str) -> str:
    result = subprocess.run(inside(work, *command), capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, f"{command}: exit code {result.returncode}: {result.stderr[-2000:]}"
    return result.stdout


def losses(work: Work, name: str) -> list[dict[str, float]]:
    path = work.folder / "image" / "runs" / name / "metrics.jsonl"
    return [json.loads(line)["losses"] for line in path.read_text().splitlines()] if path.exists() else []


def its_commands_run_read_only_as_an_unknown_user(work: Work, made: Sequence[Host]) -> None:
    make_image(work)
    expect("help", "Usage: mmmoe" in output(work, "mmmoe", "--help"), True)
    expect("version", output(work, "mmmoe-data", "--version").split()[0], "mmmoe-data")
    user = output(work, "bash", "-c", "id -u; python -c 'import getpass; print(getpass.getuser())'")
    expect("its user", user.split(), [str(USER), "mmmoe"])
    refused = subprocess.run(inside(work, "touch", "new"), capture_output=True, text=True, timeout=60, check=False)
    expect("writing", "Read-only file system" in refused.stderr, True)
    pip = output(
        work, "bash", "-c", "ls /etc/pip.conf /requirements /var/cache/pip 2>/dev/null || true; type -p gcc; true"
    )
    expect("left from the build", pip, "")


def it_trains_with_the_losses_outside(work: Work, made: Sequence[Host]) -> None:
    make_image(work)
    settings = ["train.steps=4", "train.log_every=1", "train.cpu.products=torch"]  # none measures its own
    output(work, "launch/torchrun.sh", "2", "train", "configs/demo_mini.yaml", "name=inside", *settings)
    outside = [SCRIPT, "2", "train", str(ROOT / "configs" / "demo_mini.yaml"), "name=outside", *settings]
    subprocess.run(
        outside, cwd=work.folder / "image", env=environment(), check=True, capture_output=True, timeout=600
    )
    expect("steps", len(losses(work, "inside")), 4)
    expect("same losses", losses(work, "inside") == losses(work, "outside"), True)
    owner = (work.folder / "image" / "runs" / "inside" / "metrics.jsonl").stat().st_uid
    expect("owner of its files", owner, USER)


def it_saves_when_it_is_stopped(work: Work, made: Sequence[Host]) -> None:
    make_image(work)
    command = ("launch/torchrun.sh", "2", "train", "configs/demo_mini.yaml", "name=stopped", "train.log_every=1")
    with (work.folder / "image" / "stopped.log").open("wb") as log:
        container = subprocess.Popen(inside(work, *command), stdout=log, stderr=log)
    try:
        until(lambda: container.poll() is not None or len(losses(work, "stopped")) >= 2, "step 2")
        container.send_signal(signal.SIGTERM)  # podman hands it on
        expect("exit code", container.wait(120), 75)
    finally:
        container.kill()
    checkpoints = list((work.folder / "image" / "runs" / "stopped").rglob("step_*"))
    expect("saved", bool(checkpoints), True)


CASES = {
    "image: its commands run read-only as an unknown user": its_commands_run_read_only_as_an_unknown_user,
    "image: trains with the losses outside": it_trains_with_the_losses_outside,
    "image: saves when it is stopped": it_saves_when_it_is_stopped,
}
