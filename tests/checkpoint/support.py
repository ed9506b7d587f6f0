"""A small state by hand, cut over ranks; saving in one call or late; and damage done to checkpoints."""

import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import xxhash

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.save_plan import plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.saver import Saver
from mmmoe_pretrain.checkpoint.staging import Copying
from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.parallel.agreement import agree, from_rank_0


def save(
    root: str | Path,
    step: int,
    state: ShardedState | None = None,
    meta: dict[str, Any] | None = None,
    group: Any = None,
    keep: store.Retention = store.Retention(last=9),  # noqa: B008 (frozen)
) -> store.Checkpoint:
    """What the Saver does in its thread, but errors are raised. Collective."""
    storage = agree(group, lambda: open_storage(root))
    from_rank_0(group, lambda: store.clean(root))
    state = small_state() if state is None else state
    plan = plan_save(state, group)
    checkpoint = write_checkpoint(storage, step, plan, plan.views(state), meta or {}, group)
    from_rank_0(group, lambda: store.prune(root, keep))
    return checkpoint


@contextlib.contextmanager
def late_copies() -> Iterator[None]:
    """The threads of saves copy nothing before training waits for them, as late as a busy machine can make it."""
    kept = {"run": Copying.run, "wait": Copying.wait}
    with mock.patch.multiple(Copying, **kept), mock.patch.object(Saver, "wait", Saver.wait):
        delay_copies()
        yield


def delay_copies() -> None:
    """``late_copies`` until this process ends."""
    run, wait, wait_for_save = Copying.run, Copying.wait, Saver.wait
    asked: dict[Copying, threading.Event] = {}

    def late(copying: Copying) -> list[torch.Tensor]:
        there = asked.setdefault(copying, threading.Event()).wait(20)
        copies = run(copying)
        assert there, "training did not wait for the copy"
        return copies

    def waiting(copying: Copying, timeout: float | None = None) -> float:
        asked.setdefault(copying, threading.Event()).set()
        return wait(copying, timeout)

    def waiting_for_save(saver: Saver) -> None:
        if saver._copying is not None:
            asked.setdefault(saver._copying, threading.Event()).set()
        wait_for_save(saver)

    Copying.run, Copying.wait, Saver.wait = late, waiting, waiting_for_save  # type: ignore[method-assign]


def rewrite(path: Path, data: bytes) -> None:
    """Replace a file of a checkpoint, and have the manifest agree with it: what hashes cannot see."""
    path.write_bytes(data)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def boxes_in(folder: Path) -> dict[str, list[list[Any]]]:
    """By key what version 1 has as ``boxes``, read by struct alone as the format says: rows of int64."""
    index, data = json.loads((folder / "index.json").read_text()), (folder / "boxes.bin").read_bytes()
    found: dict[str, list[list[Any]]] = {}
    for key, entry in index["tensors"].items():
        (at, count), dims = entry["boxes"], len(entry["shape"])
        rows = struct.iter_unpack(f"<{2 + 2 * dims}q", data[at : at + count * 8 * (2 + 2 * dims)])
        found[key] = [[row[0], row[1], list(row[2 : 2 + dims]), list(row[2 + dims :])] for row in rows]
    return found


def as_version_1(folder: Path) -> None:
    """Make a checkpoint one of the first version of the format, which had the boxes in index.json."""
    index = json.loads((folder / "index.json").read_text())
    boxes = boxes_in(folder)
    index["tensors"] = {
        key: {"shape": entry["shape"], "dtype": entry["dtype"], "boxes": boxes[key]}
        for key, entry in index["tensors"].items()
    }
    rewrite(folder / "index.json", json.dumps(index).encode())
    (folder / "boxes.bin").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["boxes.bin"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))


def numbers(shape: tuple[int, ...], start: float = 0.0) -> torch.Tensor:
    """Different everywhere."""
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def small_state(rank: int = 0, ranks: int = 1, add: float = 0.0) -> ShardedState:
    """``rows`` is cut over the ranks by rows, ``columns`` by columns; every rank has all of ``bias``."""
    rows, columns, bias = numbers((8, 6), add), numbers((6, 8), 100 + add), numbers((5,), 1000 + add)
    share = 8 // ranks
    begin = rank * share

    def held(offset: tuple[int, ...], shape: tuple[int, ...], tensor: torch.Tensor, name: str) -> ShardedState:
        found = {f"model/{name}": ShardedTensor(shape, {offset: tensor})}
        if len(shape) > 1:
            for moment, more in (("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
                found[f"optimizer/{name}/{moment}"] = ShardedTensor(shape, {offset: tensor + more})
        return found

    return {
        **held((begin, 0), (8, 6), rows[begin : begin + share], "rows"),
        **held((0, begin), (6, 8), columns[:, begin : begin + share], "columns"),
        **held((0,), (5,), bias, "bias"),
    }


def assert_same(found: ShardedState, expected: ShardedState, where: str = "") -> None:
    assert found.keys() == expected.keys(), where
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape and found[key].pieces.keys() == tensor.pieces.keys(), (where, key)
        for offset, piece in tensor.pieces.items():
            assert torch.equal(found[key].pieces[offset], piece), (where, key, offset)
