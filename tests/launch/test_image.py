"""The container image's files; tests/cluster/image.py builds and runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmmoe_pretrain.launch import image_requirements

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TESTED = ["numpy==2.4.6", "torch==2.13.0", "triton==3.7.1"]


def copied() -> set[str]:
    """What COPY takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    return {word for line in lines for word in line.split()[:-1]}


def test_the_dockerfile_copies_only_what_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert copied()
    assert [
        name for name in copied() if not any(file == name or file.startswith(f"{name}/") for file in tracked)
    ] == []


def test_the_build_gets_only_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"  # data, runs, .venv, .git and keys are kept out without being named
    let_in = {rule.removeprefix("!") for rule in rules[1:] if rule.startswith("!")}
    assert let_in == {name for name in copied() if not name.startswith("launch/")}
    sizes = [file.stat().st_size for name in let_in for file in (ROOT / name).rglob("*") if file.is_file()]
    assert sum(sizes) < 50e6


@pytest.mark.parametrize(
    ("installed", "constraints"),
    [
        ({"numpy": "1.26.4"}, TESTED),
        ({"numpy": "1.26.4", "torch": "2.14.0a0+nv"}, ["numpy==2.4.6", "triton==3.7.1", "torch==2.14.0a0+nv"]),
        ({"torch": "2.14.0", "triton": "3.8.0"}, ["numpy==2.4.6", "torch==2.14.0", "triton==3.8.0"]),
    ],
)
def test_a_torch_of_the_base_image_is_kept(installed: dict[str, str], constraints: list[str]) -> None:
    assert image_requirements.constraints(TESTED, installed) == constraints


def test_extras_are_those_of_the_project() -> None:
    project = {"dependencies": ["torch>=2.13"], "optional-dependencies": {"remote": ["s3fs"], "dev": ["pytest"]}}
    assert image_requirements.requirements(project, ["remote"]) == ["torch>=2.13", "s3fs"]
    with pytest.raises(ValueError, match=r"no remotes; it has remote, dev"):
        image_requirements.requirements(project, ["remotes"])


def test_hadolint_is_part_of_make_check() -> None:
    check = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    assert "hadolint Dockerfile" in check


@pytest.mark.parametrize(
    ("tools", "built"),
    [
        ({"docker": "exit 0", "buildah": "exit 0"}, "docker build --target cuda --build-arg BASE=base "),
        ({"docker": "exit 1", "podman": "exit 0", "buildah": "exit 0"}, "podman build --target cuda "),  # no daemon
        ({"buildah": "exit 0"}, "buildah bud --target cuda "),
        ({}, "make image needs docker"),
    ],
)
def test_make_image_takes_the_first_tool_that_works(tools: dict[str, str], built: str, tmp_path: Path) -> None:
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    command = [make, "image", "IMAGE_TARGET=cuda", "BASE=base"]
    environment = {"PATH": str(tmp_path)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert built in result.stderr
    assert (result.returncode == 0) == bool(tools)
