"""A small checkpoint, of which one file is damaged; the manifest may be made right again, so that the damage
gets past sizes and hashes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import xxhash

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import model_key, optimizer_key
from tests.fuzz.mutate import EXTREMES, damage, damage_json

STEP = 7
NAME = f"step_{STEP:08d}"
FILES = ("index.json", "index.json", "meta.json", "manifest.json", "rank_00000.safetensors", "latest")
OPERATIONS = ("verify", "read_meta", "load_weights", "read_state", "find_latest")


@dataclass(frozen=True)
class Damaged:
    """``repaired``: the manifest fits the damaged file. ``operations``: what is called, in this order."""

    file: str
    data: bytes
    repaired: bool
    operations: tuple[str, ...]


def weights() -> dict[str, torch.Tensor]:
    return {"mmmoe.a": torch.arange(12.0).view(3, 4), "mmmoe.b": torch.ones(5), "mmmoe.c": torch.zeros(2, 2, 2)}


def write(root: Path) -> None:
    """A whole checkpoint of three parameters and their moments."""
    state = {}
    for name, w in weights().items():
        state |= {model_key(name): w, optimizer_key(name, "exp_avg"): w + 1, optimizer_key(name, "exp_avg_sq"): w + 2}
    store.write_state(root, STEP, state, {"vocab_size": 48, "version": 1})
    (root / "latest").write_text(NAME + "\n")


def make(rng: Random, root: Path, payload: bytes) -> Damaged:
    file = rng.choice(FILES)
    whole = (root / file if file == "latest" else root / NAME / file).read_bytes()
    if rng.random() < 0.03:
        data = payload
    elif file == "latest":
        data = rng.choice(
            (b"step_99999999", b"../../x", b"\0", b"step_00000007\n" * 200_000, damage(rng, whole, whole))
        )
    elif file.endswith(".json"):
        data = damage_json(rng, whole, whole)
    else:
        length = rng.choice((0, 1, len(whole), *EXTREMES)) & 0xFFFFFFFFFFFFFFFF
        data = length.to_bytes(8, "little") + whole[8:] if rng.random() < 0.2 else damage(rng, whole, whole)
    return Damaged(file, data, rng.random() < 0.7, tuple(rng.sample(OPERATIONS, len(OPERATIONS))))


def use(damaged: Damaged, whole: Path, root: Path) -> tuple[str, str]:
    """Raises the first refusal; "skipped" where the checkpoint does not count as one any more."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    folder = root / NAME
    (root / "latest" if damaged.file == "latest" else folder / damaged.file).write_bytes(damaged.data)
    if damaged.repaired and damaged.file not in ("latest", "manifest.json"):
        _repair(folder)
    checkpoint = store.Checkpoint(str(root), NAME, STEP)
    skipped = ""
    for operation in damaged.operations:
        if operation == "find_latest":
            found = store.find_latest(root)
            skipped = "" if found == checkpoint else "it is not a complete checkpoint"
        elif operation == "load_weights":
            store.load_weights(checkpoint, {name: torch.empty_like(w) for name, w in weights().items()})
        else:
            getattr(store, operation)(checkpoint)
    return ("skipped", skipped) if skipped else ("accepted", "")


def _repair(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))
    (folder / "manifest.json").write_text(json.dumps(manifest))
