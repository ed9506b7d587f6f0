"""A small state by hand, cut over ranks; and damage done to checkpoints."""

import json
from pathlib import Path

import torch
import xxhash

from mmmoe_pretrain.checkpoint.sharded import Piece, ShardedParameter, ShardedState


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

    def pieces(offset: tuple[int, ...], tensor: torch.Tensor) -> ShardedParameter:
        whole = {2: (8, 6) if offset[-1] == 0 and tensor.shape[-1] == 6 else (6, 8), 1: (5,)}[tensor.dim()]
        moments = () if tensor.dim() == 1 else ((Piece(offset, tensor + 0.25),), (Piece(offset, tensor + 0.5),))
        return ShardedParameter(whole, (Piece(offset, tensor),), *(moments or (None, None)))

    return {
        "rows": pieces((begin, 0), rows[begin : begin + share]),
        "columns": pieces((0, begin), columns[:, begin : begin + share]),
        "bias": pieces((0,), bias),
    }


def assert_same(found: ShardedState, expected: ShardedState) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        mine, wanted = found[name].named(name), parameter.named(name)
        assert mine.keys() == wanted.keys()
        for key, pieces in wanted.items():
            for piece, other in zip(mine[key], pieces, strict=True):
                assert piece.offset == other.offset, key
                assert torch.equal(piece.tensor, other.tensor), key
