"""What pip installs into the container image (Dockerfile): requirements.txt and constraints.txt.

``python3 image_requirements.py EXTRA,... FOLDER``, beside pyproject.toml and constraints.txt. It runs before anything
is installed, with the Python of the base image. A torch that the base image brings is kept: NVIDIA's images have
libraries that are compiled against theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

KEPT = ("torch", "triton")  # of the base image: pinned to the version that is there


def requirements(project: Mapping[str, Any], extras: Sequence[str]) -> list[str]:
    """The dependencies of the ``project`` of pyproject.toml. Raises ValueError for an extra that it has not."""
    known = project["optional-dependencies"]
    if wrong := [extra for extra in extras if extra not in known]:
        raise ValueError(f"EXTRAS: pyproject.toml has no {', '.join(wrong)}; it has {', '.join(known)}")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


def constraints(tested: Sequence[str], installed: Mapping[str, str]) -> list[str]:
    """``tested`` (lines NAME==VERSION), but of KEPT the versions that are ``installed``."""
    kept = {name: installed[name] for name in KEPT if name in installed}
    others = [line for line in tested if line.partition("==")[0] not in kept]
    return [*others, *(f"{name}=={version}" for name, version in kept.items())]


def main(extras: str, folder: str) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - the base image may have any
        print(f"BASE has Python {sys.version.split()[0]}; choose an image with 3.11 or later", file=sys.stderr)
        return 2
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {(found.name or "").lower(): found.version for found in metadata.distributions()}
    try:
        wanted = requirements(project, [extra for extra in extras.split(",") if extra])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    tested = constraints(Path("constraints.txt").read_text(encoding="utf-8").splitlines(), installed)
    Path(folder).mkdir(parents=True)
    for name, lines in (("requirements.txt", wanted), ("constraints.txt", tested)):
        Path(folder, name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
