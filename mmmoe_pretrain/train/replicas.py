"""Silent data corruption: replicas of weights and optimizer moments must be equal bit by bit.

Pieces of the exported state with the same name, offset, size and type are replicas, under any layout and engine:
dense weights over the data-parallel ranks, experts over theirs, vectors over the tensor ranks, router biases over
all, and the moments of each. Every rank hashes its pieces and sends each hash to the rank that is responsible for
its name. What ZeRO shards has no replica and is not compared.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import ShardedState, pieces_of_part
from mmmoe_pretrain.parallel.agreement import gather_objects
from mmmoe_pretrain.parallel.placement import placements

MAX_NAMED = 8  # mismatches, and ranks of each, that are named
_CHUNK_BYTES = 64 << 20  # that are copied from a device at a time


@dataclass(frozen=True)
class Mismatch:
    """A piece whose replicas differ."""

    name: str  # "model/mmmoe.trunk.blocks.0.norm.weight@0 [16] float32": key, offset, size, type
    ranks: tuple[int, ...]  # the first that differ from the majority; all holders where there is none
    differing: int  # how many do
    holders: int

    def __str__(self) -> str:
        more = f" and {self.differing - len(self.ranks)} more" if self.differing > len(self.ranks) else ""
        holding = f"rank{'s' * (self.differing > 1)} {', '.join(map(str, self.ranks))}{more}"
        if self.differing == self.holders:
            return f"{self.name}: {holding} differ from each other"
        return f"{self.name}: {holding} of {self.holders}"


@dataclass(frozen=True)
class ReplicaReport:
    """Equal on every rank."""

    compared: int  # different pieces that several ranks hold
    differing: int  # of them
    mismatches: tuple[Mismatch, ...]  # the first few of those

    def __str__(self) -> str:
        listed = "; ".join(map(str, self.mismatches))
        return f"{self.differing} of {self.compared} pieces that several ranks hold differ: {listed}"


def check_replicas(
    state: ShardedState, group: dist.ProcessGroup | None, models: Sequence[nn.Module] = ()
) -> ReplicaReport:
    """Compare the replicated pieces of ``engine.export_state()`` over ``group`` (all ranks, on the host: the control
    group). Collective.

    ``models``: also compare the weights that they compute with. Needed for ZeRO 1 and 2, which shard the exported
    state and keep these weights on every rank. Not with overlap_param_gather: between steps some are of the step
    before.
    """
    if group is None or dist.get_world_size(group) == 1:
        return ReplicaReport(0, 0, ())
    names = dict(_pieces(state, models))
    rows = _exchange({_number(name): _hash(tensor) for name, tensor in names.items()}, group)
    _, senders = torch.unique(rows[:, 0], return_counts=True)
    found = _differences(rows)
    totals = torch.tensor([int((senders > 1).sum()), len(found)])
    dist.all_reduce(totals, group=group)
    compared, differing = totals.tolist()
    return ReplicaReport(compared, differing, _details(found, list(names), group) if differing else ())


def _pieces(state: ShardedState, models: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for key, held in state.items():
        for offset, tensor in held.pieces.items():
            yield _name(key, offset, tensor), tensor
    for model in models:
        placed = placements(model)
        for name, parameter in model.named_parameters():
            if not parameter.numel():  # ZeRO-3 holds it in shards
                continue
            for offset, tensor in pieces_of_part(parameter.detach(), placed[name]).items():
                yield _name(f"working/{name}", offset, tensor), tensor


def _name(key: str, offset: Sequence[int], tensor: Tensor) -> str:
    place = ",".join(map(str, offset))
    return f"{key}@{place} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _number(name: str) -> int:
    """A name in 63 bits: two of a million names collide once in ten million models."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 1


def _hash(tensor: Tensor) -> tuple[int, int]:
    """xxh3_128 of the bytes, in two signed halves; copied from a device in chunks."""
    hasher = xxhash.xxh3_128()
    for chunk in _chunks(tensor.detach()):
        hasher.update(chunk.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    digest = hasher.digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    elif tensor.ndim == 1:
        tensor = tensor.contiguous()
    below = max(1, tensor[:1].numel()) * tensor.element_size()
    yield from tensor.split(max(1, _CHUNK_BYTES // below)) if tensor.numel() else ()


def _exchange(hashes: dict[int, tuple[int, int]], group: dist.ProcessGroup) -> Tensor:
    """The rows (number of a name, hash, hash, rank) [n, 4] of all ranks that this rank is responsible for."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = torch.tensor(
        [(number, *halves, rank) for number, halves in sorted(hashes.items(), key=lambda item: item[0] % size)],
        dtype=torch.int64,
    ).view(-1, 4)
    counts = torch.bincount(rows[:, 0] % size, minlength=size)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    received = rows.new_empty(int(arriving.sum()), 4)
    dist.all_to_all_single(received, rows, arriving.tolist(), counts.tolist(), group=group)
    return received


def _differences(rows: Tensor) -> list[tuple[int, int, list[int]]]:
    """The names whose hashes differ: number, count of holders, ranks outside the majority."""
    senders: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
    for number, first, second, rank in rows.tolist():
        senders[number][rank] = (first, second)
    found = []
    for number, hashes in sorted(senders.items()):
        common, votes = Counter(hashes.values()).most_common(1)[0]
        if votes == len(hashes):
            continue
        known = 2 * votes > len(hashes)
        others = [rank for rank, value in sorted(hashes.items()) if not known or value != common]
        found.append((number, len(hashes), others))
    return found


def _details(
    found: list[tuple[int, int, list[int]]], names: list[str], group: dist.ProcessGroup
) -> tuple[Mismatch, ...]:
    """The first few of all ranks' findings, with the names, which the holders know. Collective."""
    first = [(number, holders, len(ranks), tuple(ranks[:MAX_NAMED])) for number, holders, ranks in found[:MAX_NAMED]]
    chosen = sorted(itertools.chain(*gather_objects(group, first)))[:MAX_NAMED]
    held = {_number(name): name for name in names}
    name_of: dict[int, str] = {}
    for known in gather_objects(group, {number: held[number] for number, *_ in chosen if number in held}):
        name_of |= known
    mismatches = (
        Mismatch(name_of[number], ranks, differing, holders) for number, holders, differing, ranks in chosen
    )
    return tuple(sorted(mismatches, key=lambda mismatch: mismatch.name))
