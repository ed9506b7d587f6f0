"""Debian and npm packages as plain folders, without root and without installing anything.

The package managers' clients give the URL and hash of a package, so the machine's mirrors and registries are used;
``download.py`` fetches it and this file unpacks it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.download import MissingFileError, Remote, download
from data_prep.unpack import unpack_tar
from mmmoe_pretrain.progress import Progress

_OFFLINE = "`mmmoe-data corpus mini` ships with the repository and needs no network"
_URI_LINE = re.compile(
    r"^'(?P<url>[^']+)' (?P<name>\S+) (?P<size>\d+) (?P<algorithm>SHA256|SHA512):(?P<digest>[0-9a-f]+)\s*$",
    re.M,
)


def fetch_debian(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package; the folder, and the package's version."""
    dpkg = _client("dpkg-deb", "Debian packages are unpacked")
    remote, archive = _download_debian(package, work)
    folder = work / "files" / package

    def unpack(target: Path) -> None:
        _run([dpkg, "-x", str(archive), str(target)], f"unpacking {archive.name}")

    _unpack_once(folder, remote, unpack)
    return folder, remote.name.split("_")[1].replace("%3a", ":")


def fetch_npm(package: str, version: str, work: Path) -> Path:
    """Download and unpack an npm package; the folder that holds its ``package.json``."""
    npm = _client("npm", "npm packages are looked up")
    spec = f"{package}@{version}"
    result = _call([npm, "view", spec, "dist.tarball", "dist.integrity", "--json"], 120)
    answer = _npm_answer(spec, result.stdout)
    algorithm, _, digest = str(answer.get("dist.integrity", "")).partition("-")
    if algorithm != "sha512" or "dist.tarball" not in answer:
        raise ValueError(f"npm names no sha512 of {spec}; it answers {result.stdout.strip()[:200]!r}")
    name = f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    remote = Remote(answer["dist.tarball"], name, algorithm, base64.b64decode(digest).hex())
    archive = download(remote, work / "downloads")
    folder = work / "files" / name.removesuffix(".tgz")

    def unpack(target: Path) -> None:
        try:
            with Progress(f"unpacking {archive.name}"), tarfile.open(archive) as tar:
                unpack_tar(tar, target)
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{archive.name} cannot be unpacked safely: {error}") from None

    _unpack_once(folder, remote, unpack)
    return folder / "package"


def _npm_answer(spec: str, text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict) or "error" in answer:
        reason = answer["error"].get("summary", "no reason given") if isinstance(answer, dict) else "no answer"
        raise ValueError(f"npm knows nothing of {spec} ({reason}); is the network up? {_OFFLINE}")
    return answer


def _unpack_once(folder: Path, remote: Remote, unpack: Callable[[Path], None]) -> None:
    """Unpack beside and rename; a stamp tells a later run that this very archive is unpacked."""
    stamp = folder.with_name(folder.name + ".digest")
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == remote.digest:
        return
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    unpack(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    stamp.write_text(remote.digest)


def _download_debian(package: str, work: Path) -> tuple[Remote, Path]:
    remote = _locate_debian(package, work / "apt")
    try:
        return remote, download(remote, work / "downloads")
    except MissingFileError:  # the machine's lists are older than what its mirror still has
        remote = _locate_debian(package, work / "apt", fresh=True)
        return remote, download(remote, work / "downloads")


def _locate_debian(package: str, state: Path, *, fresh: bool = False) -> Remote:
    """Where apt finds a package: by the machine's lists, or by lists of ours (``fresh``, or it has none)."""
    apt = _client("apt-get", "Debian packages are looked up")
    query = ["--print-uris", "download", package]
    output = "" if fresh else _try([apt, *query])
    if not _URI_LINE.search(output):  # slim machines carry no package lists
        private = _private_apt(state)
        _try([apt, *private, "update"], timeout=300)
        output = _try([apt, *private, *query])
    found = _URI_LINE.search(output)
    if not found:
        tail = output.strip().splitlines()[-1] if output.strip() else "no answer"
        raise ValueError(f"apt-get knows no package {package} ({tail}); is the network up? {_OFFLINE}")
    return Remote(found["url"], found["name"], found["algorithm"].lower(), found["digest"], int(found["size"]))


def _private_apt(state: Path) -> list[str]:
    """Options that keep apt's lists in a folder of ours, so that no root is needed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    root = state.resolve()
    return [
        "-o",
        f"Dir::State={root / 'state'}",
        "-o",
        f"Dir::Cache={root / 'cache'}",
        "-o",
        "APT::Sandbox::User=",
    ]


def _client(name: str, purpose: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"{name} is not installed, and {purpose} with it; {_OFFLINE}")
    return path


def _run(command: Sequence[str], what: str) -> str:
    result = _call(command, 120)
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise ValueError(
            f"{what} failed ({lines[-1].strip() if lines else result.returncode}); is the network up? {_OFFLINE}"
        )
    return result.stdout


def _try(command: Sequence[str], timeout: float = 120) -> str:
    result = _call(command, timeout)
    return result.stdout + "\n" + result.stderr


def _call(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        with Progress(f"waiting for {Path(command[0]).name}"):
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "LC_ALL": "C"},
            )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{Path(command[0]).name} gave no answer in {timeout:g} s; is the network up? {_OFFLINE}"
        ) from None
