"""Debian and npm packages as plain folders, without root and without installing anything.

The URL and hash of a package come from the clients of the package managers, so the machine's mirrors and registries
are used; ``download.py`` downloads it, and it is unpacked here.
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
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmmoe_pretrain.data_prep.corpora.download import MissingFileError, Remote, download
from mmmoe_pretrain.progress import Progress

_OFFLINE = "`mmmoe-data corpus mini` ships with the repository and needs no network"
_URI_LINE = re.compile(
    r"^'(?P<url>[^']+)' (?P<name>\S+) (?P<size>\d+) (?P<algorithm>SHA256|SHA512):(?P<digest>[0-9a-f]+)\s*$", re.M
)


def fetch_debian(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package; the folder, and the package's version."""
    dpkg = _client("dpkg-deb", "Debian packages are unpacked")
    remote = _locate_debian(package, work / "apt")
    try:
        archive = download(remote, work / "downloads")
    except MissingFileError:  # the machine's lists are older than what its mirror still has
        remote = _locate_debian(package, work / "apt", fresh=True)
        archive = download(remote, work / "downloads")

    def unpack(target: Path) -> None:
        result = _call([dpkg, "-x", str(archive), str(target)])
        if result.returncode:
            raise ValueError(f"{archive.name} cannot be unpacked ({_last_line(result) or result.returncode})")

    folder = work / "files" / package
    _unpack_once(folder, remote, unpack)
    return folder, remote.name.split("_")[1].replace("%3a", ":")


class Translations(NamedTuple):
    """A list of descriptions of a Debian release's packages in one language."""

    language: str  # as Debian spells it: pt_BR
    release: str
    path: Path


def fetch_translations(languages: Sequence[str], work: Path) -> list[Translations]:
    """apt's lists of the descriptions of Debian's packages, in ``languages`` as far as there are any.

    They are fetched into ``work``, whatever languages the machine's configuration names.
    """
    apt = _client("apt-get", "descriptions of packages are fetched")
    private = _private_apt(work / "apt-translations")
    config = work / "apt-translations" / "apt.conf"  # a list of options cannot be replaced on the command line
    names = " ".join(f'"{language}";' for language in languages)
    config.write_text(f"#clear Acquire::Languages;\nAcquire::Languages {{ {names} }};\n")
    options = [*private, "-c", str(config.resolve()), "-o", "Acquire::GzipIndexes=false"]
    options += ["-o", "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false"]
    updated = _call([apt, *options, "update"], timeout=600)
    form = "$(LANGUAGE)\t$(CODENAME)\t$(FILENAME)"
    listed = _call([apt, *options, "indextargets", "--format", form, "Created-By: Translations", "Origin: Debian"])
    lines = [line.split("\t") for line in listed.stdout.splitlines()]
    found = [Translations(name, release, Path(path)) for name, release, path in lines if name in languages]
    if not found:
        reason = _last_line(updated) or "no answer"
        raise ValueError(f"apt-get has no descriptions of packages ({reason}); is the network up? {_OFFLINE}")
    return found


def fetch_npm(package: str, version: str, work: Path) -> Path:
    """Download and unpack an npm package; the folder that holds its ``package.json``."""
    npm = _client("npm", "npm packages are looked up")
    spec = f"{package}@{version}"
    result = _call([npm, "view", spec, "dist.tarball", "dist.integrity", "--json"])
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
        raise ValueError(f"npm has no {spec} ({reason}); is the network up? {_OFFLINE}")
    return answer


def unpack_tar(tar: tarfile.TarFile, target: Path) -> None:
    """Write the files and folders of ``tar`` below ``target``, without their owners, modes and times. Raises
    ValueError for any other kind of member, and for a name that leaves the folder.

    Not ``tar.extractall``: Python 3.11.2 (Debian 12) has no extraction filters yet.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{member.name!r} is not a plain file or folder inside the archive")
        folder = target / (path if member.isdir() else path.parent)
        folder.mkdir(parents=True, exist_ok=True)
        if source := tar.extractfile(member):  # None for a folder
            with (target / path).open("wb") as file:
                shutil.copyfileobj(source, file)


def _unpack_once(folder: Path, remote: Remote, unpack: Callable[[Path], None]) -> None:
    """Unpack into a temporary folder and rename it. ``NAME.digest`` holds the digest of the archive, so that a later
    run does not unpack it again."""
    digest = folder.with_name(folder.name + ".digest")
    if folder.is_dir() and digest.is_file() and digest.read_text() == remote.digest:
        return
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    unpack(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    digest.write_text(remote.digest)


def _locate_debian(package: str, state: Path, *, fresh: bool = False) -> Remote:
    """The URL and hash of a package by the machine's lists, or by private lists (``fresh``, or the machine has
    none)."""
    apt = _client("apt-get", "Debian packages are looked up")
    query = ["--print-uris", "download", package]
    found = None if fresh else _URI_LINE.search(_call([apt, *query]).stdout)
    if not found:  # slim machines have no package lists
        private = _private_apt(state)
        _call([apt, *private, "update"], timeout=300)
        result = _call([apt, *private, *query])
        found = _URI_LINE.search(result.stdout)
    if not found:
        reason = _last_line(result) or "no answer"
        raise ValueError(f"apt-get knows no package {package} ({reason}); is the network up? {_OFFLINE}")
    return Remote(found["url"], found["name"], found["algorithm"].lower(), found["digest"], int(found["size"]))


def _private_apt(state: Path) -> list[str]:
    """Options that keep apt's lists in the folder ``state``, so that no root is needed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    root = state.resolve()
    return ["-o", f"Dir::State={root / 'state'}", "-o", f"Dir::Cache={root / 'cache'}", "-o", "APT::Sandbox::User="]


def _client(name: str, purpose: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"{name} is not installed, and {purpose} with it; {_OFFLINE}")
    return path


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + "\n" + result.stderr).strip().rpartition("\n")[2].strip()


def _call(command: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
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
