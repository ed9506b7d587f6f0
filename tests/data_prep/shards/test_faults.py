"""What happens to `mmmoe-data shard` from outside: kills, a second run, disks and sources that fail. Each ends in one
line, and a later run gives the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmmoe_pretrain.data_prep.cli import app

ROOT = Path(__file__).resolve().parents[3]
BUILDING = "building.tmp"
OPTIONS = ("--samples-per-shard", "2", "--workers", "1")


def shard(manifest: Path, out: Path) -> None:
    app(["shard", str(manifest), "--out", str(out), *OPTIONS], standalone_mode=False)


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name, but the index, which holds the shards' times, and what a kill leaves of it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "shards.index" not in path.name)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def small_files(corpus: Path) -> Iterator[None]:
    """No file may grow above 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_image(corpus: Path) -> Iterator[None]:
    (corpus / "square.png").rename(corpus / "away")
    yield
    (corpus / "away").rename(corpus / "square.png")


@contextmanager
def no_manifest(corpus: Path) -> Iterator[None]:
    (corpus / "manifest.jsonl").rename(corpus / "away")
    yield
    (corpus / "away").rename(corpus / "manifest.jsonl")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (small_files, r"building\.tmp cannot be written \(File too large\); mend that and repeat"),
        (no_image, r"every sample is broken: row-\d \(square\.png cannot be read: No such file"),
        (no_manifest, r"there is nothing at .*manifest\.jsonl"),
    ],
    ids=["disk", "image", "manifest"],
)
def test_a_fault_is_one_line_and_the_run_after_it_gives_the_bytes_of_an_undisturbed_one(
    make_manifest: Callable[..., Path], tmp_path: Path, fault: Callable[[Path], Iterator[None]], message: str
) -> None:
    manifest = make_manifest(5)
    shard(manifest, tmp_path / "whole")
    with fault(manifest.parent), pytest.raises(ValueError, match=message) as refused:  # type: ignore[attr-defined]
        shard(manifest, tmp_path / "out")
    assert "\n" not in str(refused.value)
    shard(manifest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "is_file", [True, pytest.param(False, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write"))]
)
def test_a_target_that_cannot_be_written_is_named(make_manifest, tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "target"
    target.touch() if is_file else target.mkdir(mode=0o555)
    with pytest.raises(ValueError, match=r"target/out cannot be written \(.*\); choose another --out"):
        shard(make_manifest(2), target / "out")


def many_images(folder: Path) -> Path:
    """A manifest of 320 rows of an image that takes some time."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(folder / "0.png", compress_level=1)
    rows = []
    for number in range(320):
        if number:
            os.link(folder / "0.png", folder / f"{number}.png")
        split = "val" if number % 5 == 0 else "train"
        rows.append({"key": str(number), "image": f"{number}.png", "text": f"Number {number}.", "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(corpus: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "mmmoe_pretrain.data_prep.cli",
        "shard",
        str(corpus),
        "--out",
        str(out),
        "--image-size",
        "16",
    ]
    return subprocess.Popen(
        [*command, "--samples-per-shard", "8", "--workers", "2"], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and not found() and time.monotonic() < end:
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 3 minutes on two free cores
def test_twenty_kills_at_random_moments_and_the_runs_after_them_give_the_bytes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    corpus, whole, out = many_images(tmp_path / "corpus"), tmp_path / "whole", tmp_path / "out"
    process = start(corpus, whole)
    wait_for((whole / BUILDING).exists, process)
    began = time.monotonic()
    assert process.wait(120) == 0, process.stdout and process.stdout.read()
    seconds, rng = time.monotonic() - began, random.Random(0)
    kills = resumed = ended = 0
    while kills < 20:
        finished = out / BUILDING / "finished.jsonl"
        resumed += finished.exists() and finished.stat().st_size > 0
        process = start(corpus, out)
        if rng.random() < 0.25:  # while the shards are moved
            wait_for((out / BUILDING / "whole").exists, process)
        else:
            wait_for((out / BUILDING).exists, process)
            wait_for(lambda: False, process, rng.uniform(0, seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        output, _ = process.communicate(timeout=60)
        if process.returncode == 0 or "holds complete shards" in output:  # a kill came while they were indexed
            assert contents(out) == contents(whole)
            ended += 1
            out = tmp_path / f"out_{ended}"
        else:
            assert process.returncode == -signal.SIGKILL, output
    process = start(corpus, out)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert contents(out) == contents(whole)
    assert resumed >= 3


@pytest.mark.slow
def test_of_two_runs_into_one_folder_the_second_is_refused_and_a_source_that_vanishes_loses_nothing(
    tmp_path: Path,
) -> None:
    corpus, out = many_images(tmp_path / "corpus"), tmp_path / "out"
    first = start(corpus, out)
    wait_for((out / BUILDING / "lock").exists, first)
    second = start(corpus, out)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and said.splitlines()[-1].startswith(
        "mmmoe-data: another `mmmoe-data shard` is writing"
    )
    assert first.wait(60) == 0, first.stdout and first.stdout.read()
    other = tmp_path / "other"
    third = start(corpus, other)
    finished = other / BUILDING / "finished.jsonl"
    wait_for(lambda: finished.exists() and finished.read_text(), third)
    corpus.rename(tmp_path / "away")
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 2 and "cannot be used" in said.splitlines()[-1], said
    (tmp_path / "away").rename(corpus)
    again = start(corpus, other)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "an earlier run had finished" in said, said
    assert contents(other) == contents(out)
