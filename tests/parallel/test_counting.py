"""The counter of collectives, by calls made by hand on two ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _coalescing_manager
from torch.distributed import _functional_collectives as functional

from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.counting import ALL_TO_ALL, POINT_TO_POINT, CollectiveCounter, Total
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

ROW = 4 * 4  # bytes of four fp32 values


def both_ways(tensor: Tensor) -> None:
    all_reduce_sum(tensor.requires_grad_(), dist.group.WORLD).sum().backward()


def coalesced() -> None:
    with _coalescing_manager():
        for size in (2, 3):
            dist.all_reduce(torch.ones(size))


def exchange(rank: int) -> None:
    other = 1 - rank
    operations = [dist.P2POp(dist.isend, torch.ones(7), other), dist.P2POp(dist.irecv, torch.ones(7), other)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def counts() -> dict[str, tuple[str, int, float]]:
    """By name of the call: its kind, how many, and their bytes."""
    found = {}
    with process_group(timeout_minutes=0.5):
        rank = dist.get_rank()
        receive = [1 + rank, 1 + rank]  # of each: one row for rank 0 and two for rank 1
        made = {
            "uneven": lambda: dist.all_to_all_single(torch.empty(sum(receive), 4), torch.ones(3, 4), receive, [1, 2]),
            "even": lambda: dist.all_to_all_single(torch.empty(6, 4), torch.ones(6, 4)),
            "all_reduce": lambda: dist.all_reduce(torch.ones(5)),
            "backward": lambda: both_ways(torch.ones(5)),
            "coalesced": coalesced,
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(3), torch.ones(6)),
            "gather": lambda: dist.all_gather_into_tensor(torch.empty(6), torch.ones(3)),
            "gather_list": lambda: dist.all_gather([torch.empty(3)] * 2, torch.ones(3, dtype=torch.float32)),
            "broadcast": lambda: dist.broadcast(torch.ones(4), src=0),
            "send": lambda: exchange(rank),
            "barrier": dist.barrier,
        }
        for name, call in made.items():
            with CollectiveCounter() as counter:
                call()
            ((kind, ranks), total), *others = counter.totals().items()
            assert ranks == (0, 1) and not others, name
            found[name] = (kind, total.calls, total.sent)
        with CollectiveCounter() as counter:
            pass
        assert counter.calls == [] and counter.sent == 0
        with pytest.raises(NotImplementedError, match="gather_"), CollectiveCounter():
            dist.gather(torch.ones(1), [torch.ones(1)] * 2 if rank == 0 else None)
        with pytest.raises(NotImplementedError, match="all_reduce"), CollectiveCounter():
            functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD)
        dist.barrier()
    return found


def test_bytes_that_leave_a_rank_by_hand() -> None:
    common = {
        "even": ("all-to-all", 1, 3 * ROW),
        "all_reduce": ("all-reduce", 1, 2 * 5 * 4 / 2),
        "backward": ("all-reduce", 2, 2 * 5 * 4),
        "coalesced": ("all-reduce", 1, 5 * 4),
        "reduce_scatter": ("reduce-scatter", 1, 6 * 4 / 2),
        "gather": ("all-gather", 1, 3 * 4),
        "gather_list": ("all-gather", 1, 3 * 4),
        "broadcast": ("broadcast", 1, 4 * 4 / 2),
        "send": ("point-to-point", 1, 7 * 4),
        "barrier": ("barrier", 1, 0.0),
    }
    first, second = run_ranks(2, counts)
    assert first == {"uneven": ("all-to-all", 1, 2 * ROW), **common}
    assert second == {"uneven": ("all-to-all", 1, 1 * ROW), **common}


def groups_of_three() -> dict[tuple[str, tuple[int, ...]], Total]:
    with process_group(timeout_minutes=0.5):
        rank = dist.get_rank()
        pair, alone = dist.new_group([0, 2]), [dist.new_group([r]) for r in range(3)][rank]
        with CollectiveCounter() as counter:
            dist.all_reduce(torch.ones(6, dtype=torch.bfloat16))
            dist.all_reduce(torch.ones(6), group=alone)
            if rank != 1:
                dist.all_to_all_single(torch.empty(2), torch.ones(2), group=pair)
                other = 2 - rank
                if rank == 0:
                    dist.send(torch.ones(3), other, group=pair)
                else:
                    dist.recv(torch.empty(3), other, group=pair)
        dist.barrier()
    return counter.totals()


def test_calls_are_distinguished_by_group_and_groups_of_one_move_nothing() -> None:
    everyone, pair = ("all-reduce", (0, 1, 2)), (ALL_TO_ALL, (0, 2))
    found = run_ranks(3, groups_of_three)
    ring = Total(1, 6 * 2 * 2 * 2 / 3)
    for totals in found:
        assert math.isclose(totals.pop(everyone).sent, ring.sent)
    assert found[0] == {pair: Total(1, 4.0), (POINT_TO_POINT, (0, 2)): Total(1, 12.0)}
    assert found[1] == {}
    assert found[2] == {pair: Total(1, 4.0)}
