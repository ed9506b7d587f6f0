"""Our shards in webdataset, wids, Hugging Face's datasets and Megatron-Energon, each in an environment of its own.

webdataset is a dependency of the project and always tested. ``pytest -m network tests/data_prep/test_peers.py`` tests
the others, and makes their environments below data/environments.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common.environments import environment_of
from mmmoe_pretrain.data_prep.cli import app
from tests.data_prep import read_with_peer
from tests.data_prep.read_with_peer import Found, digest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {  # what manifests have -> what shards have
    "Zeile 1.é": "Zeile%201%2E%C3%A9", "text": "text", "document": "document", "series": "series", "image": "image",
    **{f"row-{number}": f"row-{number}" for number in range(6)},
}  # fmt: skip


@pytest.fixture
def shards(make_manifest: Callable[..., Path], tmp_path: Path) -> Path:
    """Rows of every kind, three a shard: 8 of train in 3 shards, 1 of val, 2 of test."""
    manifest = make_manifest(6)
    np.save(manifest.parent / "steps.npy", np.arange(6.0).reshape(2, 3))
    (manifest.parent / "steps.csv").write_text("1,2\n3,4\n")
    parts = [{"text": "One."}, {"image": "square.png"}, {"text": "Two."}, {"audio": "0.wav"}, {"file": "steps.csv"}]
    rows: list[dict[str, Any]] = [
        {"key": "Zeile 1.é", "text": "Ein Text.", "split": "validation"},
        {"key": "text", "text": "Only a text.", "score": 0.5, "boxes": [[1, 2]]},
        {"key": "document", "parts": parts},
        {"key": "series", "series": "steps.npy", "text": "Steps."},
        {"key": "image", "image": "square.png", "score": 1},
    ]
    with manifest.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    command = ["shard", str(manifest), "--out", str(tmp_path / "out"), "--samples-per-shard", "3", "--workers", "1"]
    app(command, standalone_mode=False)
    return tmp_path / "out"


def in_tars(folder: Path) -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    """What the standard library reads."""
    found: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
    for path in sorted(folder.glob("*/*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
        found.setdefault(path.parent.name, []).extend(samples.items())
    return found


def columns_of(sample: dict[str, bytes]) -> dict[str, Any]:
    """What `datasets` has of a sample: no NumPy files, and no lists of its JSON."""
    values = json.loads(sample["json"])
    fields = {name: value for name, value in values.items() if not isinstance(value, list)}
    return {
        **{name: digest(data) for name, data in sample.items() if not name.endswith(("json", "npy"))},
        "json": fields,
    }


def check(folder: Path, name: str, found: Found) -> None:
    samples = in_tars(folder)
    assert {split: len(rows) for split, rows in samples.items()} == {"train": 8, "val": 1, "test": 2}
    assert len(list(folder.glob("train/*.tar"))) == 3
    keys = [key for rows in samples.values() for key, _ in rows]
    assert sorted(keys) == sorted(KEYS.values())
    as_read = columns_of if name == "datasets" else lambda sample: {k: digest(v) for k, v in sample.items()}
    expected = {split: [[key, as_read(it)] for key, it in rows] for split, rows in samples.items()}
    assert {split: [list(row) for row in rows] for split, rows in found.items()} == expected


def test_webdataset_reads_what_was_written(shards: Path) -> None:
    check(shards, "webdataset", read_with_peer.webdataset(shards))


@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["wids", "datasets", "energon"])
def test_other_libraries_read_what_was_written(shards: Path, name: str) -> None:
    python = environment_of(name, ROOT / "data" / "environments")
    command = [python, str(ROOT / "tests/data_prep/read_with_peer.py"), name, str(shards)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, cwd=shards.parent)
    check(shards, name, json.loads(done.stdout.splitlines()[-1]))
