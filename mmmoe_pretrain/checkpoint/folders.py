"""Which checkpoints there are, which are complete, which may go, and deleting them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmoe_pretrain.checkpoint.index import MAX_MANIFEST, MAX_META, Manifest, parse_json, parse_manifest
from mmmoe_pretrain.checkpoint.names import (
    FILE,
    FOLDER,
    LATEST,
    LEFTOVER,
    MANIFEST,
    META,
    OLD,
    Checkpoint,
    checkpoint_at,
)
from mmmoe_pretrain.checkpoint.storage import Storage, open_storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep: the ``last`` ones, those at multiples of ``every`` steps, and the ``best`` by
    metric."""

    last: int = 2
    every: int = 0  # steps; 0: none
    best: int = 0


def to_delete(
    checkpoints: Sequence[Checkpoint], metrics: Mapping[int, float | None], retention: Retention
) -> list[Checkpoint]:
    """The complete checkpoints to delete, oldest first. The newest is always kept.

    ``metrics`` are by step, the lower the better; one without a finite metric is never among the best, and of
    equals the later is better.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    kept = {c.step for c in ordered[-max(1, retention.last) :]}
    if retention.every:
        kept |= {c.step for c in ordered if c.step % retention.every == 0}
    known = [
        (metric, -c.step) for c in ordered if (metric := metrics.get(c.step)) is not None and math.isfinite(metric)
    ]
    kept |= {-step for _, step in sorted(known)[: retention.best]}
    return [c for c in ordered if c.step not in kept]


def checkpoints(root: str | Path) -> list[Checkpoint]:
    """The complete ones, oldest first."""
    storage = open_storage(root)
    found = [c for c in named_checkpoints(storage) if _is_complete(storage, c)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_latest(root: str | Path) -> Checkpoint | None:
    """The checkpoint that ``latest`` names if it is complete; or else the newest complete one before that; or else
    the newest complete one; or None."""
    storage = open_storage(root)
    latest = _pointed_at(storage)
    named = None if latest is None else checkpoint_at(storage.root, latest)
    if named is not None and _is_complete(storage, named):
        return named
    found = checkpoints(root)
    found = [c for c in found if named is not None and c.step <= named.step] or found
    if latest is not None:
        taken = f"the newest complete one is {found[-1].name}" if found else "and there is no other"
        log.warning("%s/%s names %.100r, which is not complete; %s", storage.root, LATEST, latest, taken)
    return found[-1] if found else None


def candidates(root: str | Path) -> list[Checkpoint]:
    """On one rank, while nothing writes: the checkpoints that a run may resume from, oldest first. They are the
    complete ones, but none later than ``find_latest`` gives.

    A later one is left by a rollback that was killed before it deleted it (``rewind``), or by a save that was killed
    between the checkpoint and ``latest``. It does not count: the run replaces it when it saves that step again, or
    ``rewind`` deletes it. If the latest checkpoint is damaged, the one before is used. Checkpoints that a kill left
    under their temporary name are restored first (``put_back``).
    """
    put_back(root)
    newest = find_latest(root)
    return [] if newest is None else [c for c in checkpoints(root) if c.step <= newest.step]


def complete(storage: Storage, checkpoint: Checkpoint) -> Manifest:
    """The manifest of a complete checkpoint. Raises ValueError where it is not one."""
    data = read_file(storage, checkpoint, MANIFEST, MAX_MANIFEST)
    manifest = parse_manifest(data, str(checkpoint))
    if manifest.step != checkpoint.step:
        raise ValueError(f"{checkpoint} is damaged: its {MANIFEST} is of step {manifest.step}")
    there = storage.sizes(checkpoint.name)
    for record in manifest.files.values():
        if there.get(record.name) != record.nbytes:
            raise ValueError(
                f"{checkpoint} is damaged: {record.name} has {there.get(record.name, 'no')} bytes of "
                f"{record.nbytes}; delete that folder to resume from the one before, or restore the file"
            )
    return manifest


def read_file(storage: Storage, checkpoint: Checkpoint, name: str, limit: int) -> bytes:
    """A file of a checkpoint, whole. Raises ValueError where it is missing, or larger than ``limit``."""
    data = storage.read(f"{checkpoint.name}/{name}", limit)
    if data is None:
        raise ValueError(
            f"{checkpoint} has no {name}, so it is not complete; delete that folder to resume from another one"
        )
    return data


def read_meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata saved with the tensors, including ``step``."""
    data = read_file(open_storage(checkpoint.root), checkpoint, META, MAX_META)
    meta = parse_json(data, str(checkpoint), META)
    if type(meta.get("step")) is not int or meta["step"] != checkpoint.step:
        raise ValueError(f"{checkpoint} is damaged: its {META} is of step {str(meta.get('step'))[:40]}")
    return meta


def prune(root: str | Path, keep: Retention) -> list[Checkpoint]:
    """On one rank: delete what ``keep`` does not keep of the newest checkpoint and those before it; what was
    deleted. Later ones, from before a rollback, are kept (``rewind`` deletes them)."""
    newest = find_latest(root)
    found = [c for c in checkpoints(root) if newest is not None and c.step <= newest.step]
    metrics = {c.step: _metric(c) for c in found} if keep.best else {}
    deleted = to_delete(found, metrics, keep)
    for checkpoint in deleted:
        open_storage(root).remove_folder(checkpoint.name)
    return deleted


def rewind(checkpoint: Checkpoint) -> None:
    """On one rank: make this one the newest and delete later ones, the newest first, before a run resumes from it.

    If it is killed at any point, ``candidates`` has no later one.
    """
    storage = open_storage(checkpoint.root)
    complete(storage, checkpoint)
    storage.replace(LATEST, f"{checkpoint.name}\n".encode())
    for other in reversed(named_checkpoints(storage)):
        if other.step > checkpoint.step:
            storage.remove_folder(other.name)


def put_back(root: str | Path) -> list[Checkpoint]:
    """On one rank, while nothing writes: restore checkpoints that were moved aside for a newer one of the same step
    when a kill interrupted the save. Where folders cannot be exchanged they may be the only ones."""
    storage = open_storage(root)
    folders = storage.folders()
    back = []
    for folder in folders:
        checkpoint = checkpoint_at(storage.root, folder.removesuffix(OLD))
        if not folder.endswith(OLD) or checkpoint is None or checkpoint.name in folders:
            continue
        if _is_complete(storage, Checkpoint(storage.root, folder, checkpoint.step)):
            storage.put_back(checkpoint.name)
            log.warning("%s was about to be replaced when the run was killed; it is back in its place", checkpoint)
            back.append(checkpoint)
    return back


def clean(root: str | Path) -> list[str]:
    """On one rank, before a run's first save: delete what killed writers left; the names of the folders.

    Folders with a manifest, damaged or not, and folders with files of other programs are kept.
    """
    put_back(root)
    storage = open_storage(root)
    deleted = []
    for name in storage.folders():
        files = storage.sizes(name)
        leftover = LEFTOVER.fullmatch(name) or (FOLDER.fullmatch(name) and MANIFEST not in files)
        if leftover and all(FILE.fullmatch(file) for file in files):
            storage.remove_folder(name)
            deleted.append(name)
    return deleted


def named_checkpoints(storage: Storage) -> list[Checkpoint]:
    """All folders that are checkpoints by name, complete or not, oldest first."""
    found = (checkpoint_at(storage.root, name) for name in storage.folders())
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def _is_complete(storage: Storage, checkpoint: Checkpoint) -> bool:
    try:
        complete(storage, checkpoint)
    except ValueError as error:
        if isinstance(error, OSError):  # the disk or service failed, not the checkpoint
            raise
        return False
    return True


def _pointed_at(storage: Storage) -> str | None:
    try:
        data = storage.read(LATEST, limit=1000)
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        return "a large file"
    return None if data is None else data.decode(errors="replace").strip()


def _metric(checkpoint: Checkpoint) -> float | None:
    value = read_meta(checkpoint).get("metric")
    return float(value) if isinstance(value, int | float) else None
