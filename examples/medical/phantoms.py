"""Synthetic phantoms of chest X-rays, of no patient: studies of up to two views with a finding and a report.

    python examples/medical/phantoms.py --out data/phantoms

A study has a front view and a side view of 64 pixels; 30% have no side view and 10% no front view. The finding is one
of four: none, a nodule, fluid at the bottom of a lung, an enlarged heart. The front view alone tells left from right;
a nodule behind the heart is seen from the side. A third of the training studies have no report. Writes
OUT/{train,val,test}/00000.tar, OUT/test_front and OUT/test_side (the test studies with one of their views) and
OUT/manifest.jsonl with the reports, for training a tokenizer. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
FINDINGS = ("none", "nodule", "fluid", "large_heart")
SPLITS = {"train": 3000, "val": 300, "test": 800}
NO_SIDE, NO_FRONT, NO_REPORT = 0.3, 0.1, 1 / 3
NOISE = 0.12
DOWN, ACROSS = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) * 2 - 1  # from -1 to 1; across is left to right, or back to front


@dataclass(frozen=True)
class Study:
    """``front`` and ``side``: [SIZE, SIZE], brightness from 0 to 1; None without that view."""

    finding: str
    report: str
    front: np.ndarray | None
    side: np.ndarray | None


def ellipse(across: float, down: float, wide: float, high: float) -> np.ndarray:
    """1 inside, falling to 0 over about two pixels."""
    distance = np.hypot((ACROSS - across) / wide, (DOWN - down) / high)
    return np.clip((1 - distance) * min(wide, high) * SIZE / 4 + 0.5, 0, 1)


def study(rng: np.random.Generator, finding: str) -> Study:
    """One of a random person."""
    shift, heart = rng.normal(0, 0.05, 4), rng.uniform(0.26, 0.34)
    if finding == "large_heart":
        heart *= rng.uniform(1.2, 1.45)
    right, upper = bool(rng.integers(2)), bool(rng.integers(2))
    lung = 0.4 if right else -0.4
    front = 0.75 * ellipse(0, 0, 0.92, 0.97)
    for place in (-0.42, 0.42):
        front -= 0.5 * ellipse(place + shift[0], -0.05 + shift[1], 0.3, 0.62)
    front += 0.4 * ellipse(-0.12 + shift[0], 0.25 + shift[1], heart, heart * 1.1)
    side = 0.7 * ellipse(0, 0, 0.8, 0.97) - 0.4 * ellipse(0.05 + shift[2], -0.05 + shift[1], 0.5, 0.65)
    side += 0.35 * ellipse(0.35 + shift[2], 0.28 + shift[1], heart * 0.9, heart * 1.1) + 0.3 * ellipse(
        -0.72, 0, 0.1, 0.9
    )
    report = "no finding"
    if finding == "nodule":
        down, deep = rng.uniform(-0.45, -0.15) if upper else rng.uniform(0.1, 0.4), rng.uniform(-0.3, 0.3)
        radius, across = rng.uniform(0.08, 0.14), lung + shift[0] + rng.uniform(-0.15, 0.15)
        front += 0.4 * ellipse(across, down + shift[1], radius, radius)
        side += 0.4 * ellipse(deep + shift[2], down + shift[1], radius, radius)
        report = f"nodule in the {'right' if right else 'left'} {'upper' if upper else 'lower'} lung"
    elif finding == "fluid":
        level = rng.uniform(0.3, 0.5)
        front += 0.35 * (level + shift[1] < DOWN) * ellipse(lung + shift[0], -0.05 + shift[1], 0.3, 0.62)
        side += 0.3 * (level + shift[1] < DOWN) * ellipse(-0.15 + shift[2], -0.05 + shift[1], 0.3, 0.65)
        report = f"fluid in the {'right' if right else 'left'} lung"
    elif finding == "large_heart":
        report = "enlarged heart"
    front, side = (view + rng.normal(0, NOISE, view.shape) for view in (front, side))
    return Study(finding, report, np.clip(front, 0, 1), np.clip(side, 0, 1))


def some(rng: np.random.Generator, count: int, whole: bool) -> list[Study]:
    """``whole``: nothing is missing."""
    found = []
    for number in range(count):
        one, (side, front, report) = study(rng, FINDINGS[number % len(FINDINGS)]), rng.random(3)
        if not whole:
            one = replace(one, report="" if report < NO_REPORT else one.report)
            if side < NO_SIDE:
                one = replace(one, side=None)
            elif front < NO_FRONT:
                one = replace(one, front=None)
        found.append(one)
    return found


def png(view: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(view * 255).astype(np.uint8)).convert("RGB").save(file, "png")
    return file.getvalue()


def write(folder: Path, name: str, studies: Iterable[Study]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, one in enumerate(studies):
            key = f"{name}-{number:05d}"
            views = {"front.png": one.front, "side.png": one.side}
            members = [(extension, png(view)) for extension, view in views.items() if view is not None]
            if one.report:
                members.append(("txt", one.report.encode()))
            meta = {"finding": one.finding, "group": key, "language": "en"}
            for extension, content in (*members, ("json", json.dumps(meta).encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of studies, for a trial")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    splits = {
        name: some(rng, max(8, round(options.share * count)), whole=name == "test") for name, count in SPLITS.items()
    }
    for name, studies in splits.items():
        write(options.out / name, name, studies)
    write(options.out / "test_front", "test", [replace(one, side=None) for one in splits["test"]])
    write(options.out / "test_side", "test", [replace(one, front=None) for one in splits["test"]])
    with (options.out / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for number, one in enumerate(splits["train"]):
            if one.report:
                print(json.dumps({"key": str(number), "text": one.report, "split": "train"}), file=manifest)
    print(f"wrote {', '.join(f'{len(its):,} {name}' for name, its in splits.items())} studies to {options.out}")


if __name__ == "__main__":
    main()
