"""Shards of a smart watch's accelerometer and gyroscope with a sentence on what its wearer does.

    python examples/sensors.py --out data/sensors                 real: BasicMotions, out of sktime's wheel
    python examples/sensors.py --out data/sensors --synthetic     generated: for a machine without a network

BasicMotions (UEA archive): four students, four activities, ten seconds at 10 Hz, six channels; 40 recordings to
train on and 40 to test. Writes OUT/{train,test}/00000.tar and OUT/manifest.jsonl, for training a tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

WHEEL = "sktime==1.2.0"
MEMBER = "sktime/datasets/data/BasicMotions/BasicMotions_{}.ts"
SENTENCES = {
    "Standing": "a person is standing still",
    "Walking": "a person is walking",
    "Running": "a person is running",
    "Badminton": "a person is playing badminton",
}
Recording = tuple[str, np.ndarray]  # label, [channels, steps]


def recorded(out: Path) -> dict[str, list[Recording]]:
    """The real ones, by split."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(out), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(out.glob("sktime-*.whl"))) as wheel:
        return {split.lower(): parse(wheel.read(MEMBER.format(split)).decode()) for split in ("TRAIN", "TEST")}


def parse(text: str) -> list[Recording]:
    """The ``.ts`` format: channels separated by colons, the label last."""
    lines = text.partition("@data")[2].split()
    found = []
    for line in lines:
        *channels, label = line.split(":")
        found.append((label, np.asarray([list(map(float, channel.split(","))) for channel in channels])))
    return found


def synthetic() -> dict[str, list[Recording]]:
    """Sine waves whose frequency and amplitude depend on the activity."""
    rng = np.random.default_rng(0)

    def one(label: str) -> np.ndarray:
        number = list(SENTENCES).index(label)
        time, phase = np.arange(100) / 10, rng.uniform(0, 6, (6, 1))
        wave = np.sin(2 * np.pi * (0.3 + 0.7 * number) * time + phase)
        return wave * (0.1 + number) + 0.2 * rng.standard_normal((6, 100))

    return {split: [(label, one(label)) for label in SENTENCES for _ in range(10)] for split in ("train", "test")}


def write(out: Path, splits: dict[str, list[Recording]]) -> None:
    with (out / "manifest.jsonl").open("w") as manifest:
        for split, recordings in splits.items():
            (out / split).mkdir(parents=True, exist_ok=True)
            with tarfile.open(out / split / "00000.tar", "w") as tar:
                for number, (label, value) in enumerate(recordings):
                    key, text = f"{split}-{number:03d}", SENTENCES[label]
                    array = io.BytesIO()
                    np.save(array, value.astype(np.float32))
                    meta = {"label": label.lower(), "group": label, "language": "en"}
                    for extension, content in (
                        ("npy", array.getvalue()),
                        ("txt", text.encode()),
                        ("json", json.dumps(meta).encode()),
                    ):
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    manifest.write(json.dumps({"key": key, "text": text, "split": split}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--synthetic", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out, synthetic() if options.synthetic else recorded(options.out))
    print(f"wrote {options.out}/train and {options.out}/test")
