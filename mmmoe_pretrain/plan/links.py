"""Which link a group's bytes take, and how long they take there.

Ranks are numbered with the tensor rank fastest, then expert, expert-data and pipeline rank (parallel/mesh.py), and
fill one node after the other. So a group is ``size`` ranks at a fixed ``stride``, or all ranks of some of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmmoe_pretrain.parallel.counting import ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan.communication import Transfer
from mmmoe_pretrain.plan.machines import Collective, Machine


@dataclass(frozen=True)
class LinkTraffic:
    """A ``Transfer`` of one rank over a step: bytes sent inside its node and across nodes, and seconds alone."""

    what: str
    kind: str
    group: str
    ranks: int
    calls: float
    inside: float
    across: float
    seconds: float


def strides(layout: Layout) -> dict[str, tuple[int, int]]:
    """(distance of neighbours, ranks) of each group by its name in ``communication``. Those of the norm
    alone, ``MODEL`` and ``EXPERT_MODEL``, have no fixed stride; theirs is the mean distance."""
    tensor, data, pipeline = layout.tensor, layout.data, layout.pipeline
    return {
        plan.TENSOR: (1, tensor),
        plan.EXPERT: (tensor, layout.expert),
        plan.EXPERT_DATA: (tensor * layout.expert, layout.expert_data),
        plan.DATA: (tensor, data),
        plan.PIPELINE: (tensor * data, pipeline),
        plan.MODEL: (data, tensor * pipeline),
        plan.EXPERT_MODEL: (layout.expert_data, tensor * layout.expert * pipeline),
        plan.WORLD: (1, layout.world_size),
    }


def refuse_split_groups(gpus: int, ranks_per_node: int, layout: Layout | None = None) -> None:
    """ValueError where nodes of this size are not filled, or divide the ranks of ``layout`` that share matrices and
    experts unevenly: ``on_one_node`` counts such groups as if they began with a node."""
    if gpus <= ranks_per_node:
        return
    if gpus % ranks_per_node:
        raise ValueError(
            f"--gpus {gpus} does not fill nodes of --gpus-per-node {ranks_per_node}; give a multiple, e.g. --gpus "
            f"{gpus // ranks_per_node * ranks_per_node}, or another --gpus-per-node"
        )
    together = 1 if layout is None else layout.tensor * layout.expert
    if layout is not None and together % ranks_per_node and ranks_per_node % together:
        raise ValueError(
            f"--gpus-per-node {ranks_per_node} splits the {together} ranks that share matrices and experts (tensor "
            f"{layout.tensor} x expert {layout.expert}) unevenly over nodes; give one that divides {together} or is "
            f"a multiple of it, or another parallel.expert_parallel_size"
        )


def on_one_node(stride: int, size: int, ranks_per_node: int) -> int:
    """The fewest members of a group that share a node with each other."""
    return max(1, min(size, ranks_per_node // stride))


def placed(transfer: Transfer, layout: Layout, machine: Machine, times: float = 1.0) -> LinkTraffic:
    """``times``: how often it happens.

    A ring that passes through each node once leaves it on one of the node's g links of the group: of a rank's bytes
    1 / g go across, as a mean over these ranks, whose network cards share them. In an all-to-all a rank's R - 1 peers
    get equal shares, g - 1 of them inside. A message between pipeline stages takes one link.
    """
    stride, size = strides(layout)[transfer.group]
    near = on_one_node(stride, size, machine.ranks_per_node)
    if near >= size:
        share = 0.0
    elif transfer.kind == ALL_TO_ALL:
        share = (size - near) / (size - 1)
    else:
        share = 1 / near
    across = share * transfer.sent
    inside = transfer.sent - across
    known = nearest(machine, transfer.kind, transfer.ranks, machine.shares_cores(layout.world_size))
    if known is None:
        seconds = transfer.calls * _latency(transfer, near, machine)
        seconds += max(inside / machine.node.bandwidth, across / machine.network.bandwidth)  # at the same time
    else:  # for other numbers of ranks in proportion to the steps of a ring
        steps = (transfer.ranks - 1) / (known.ranks - 1)
        seconds = transfer.calls * steps * known.taken(transfer.sent / transfer.calls / steps)
    return LinkTraffic(
        transfer.what, transfer.kind, transfer.group, transfer.ranks, times * transfer.calls, times * inside,
        times * across, times * seconds,
    )  # fmt: skip


def _latency(transfer: Transfer, near: int, machine: Machine) -> float:
    """Seconds of a call without bytes. Hops: of a ring R - 1, each inside a node or across; of an all-reduce, which
    NCCL makes over trees where little is sent, the logarithm there and back; in an all-to-all the messages to all
    peers are under way at once."""
    inside, across = near - 1.0, transfer.ranks / near - 1.0
    if transfer.kind in (ALL_TO_ALL, POINT_TO_POINT):
        return machine.network.latency if across else machine.node.latency
    if transfer.kind == ALL_REDUCE:
        inside, across = 2 * math.log2(inside + 1), 2 * math.log2(across + 1)
    return inside * machine.node.latency + across * machine.network.latency


def nearest(machine: Machine, kind: str, ranks: int, shared: bool = False) -> Collective | None:
    """The measured collective of this kind (a reduce-scatter, all-gather or broadcast else as an all-reduce, whose
    bytes are of the same ring) with the nearest number of ranks, of those measured where cores were ``shared`` or not
    if there are any; None where none was measured."""
    for wanted in (kind, ALL_REDUCE):
        found = [each for each in machine.collectives if each.kind == wanted]
        alike = [each for each in found if each.shared == shared]
        if found:
            return min(alike or found, key=lambda each: abs(each.ranks - ranks))
        if kind in (ALL_TO_ALL, POINT_TO_POINT):
            return None
    return None
