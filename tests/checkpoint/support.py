"""A small state by hand, cut over ranks; and damage done to checkpoints."""

import json
from pathlib import Path

import torch
import xxhash

from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor


def rewrite(path: Path, data: bytes) -> None:
    """Replace a file of a checkpoint, and have the manifest agree with it: what hashes cannot see."""
    path.write_bytes(data)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


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
