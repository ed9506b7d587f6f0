"""Values and errors that ranks share: from rank 0, of any rank, gathered, or summed beside other work."""

import pytest
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.storage import StorageError
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.parallel.agreement import (
    BackgroundSum,
    agree,
    any_rank,
    exchange,
    from_rank_0,
    gather_objects,
    number_from_rank_0,
)
from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks


def only_on_rank_0() -> str:
    assert dist.get_rank() == 0
    return "seen by rank 0"


def fail(kind: type[Exception]) -> None:
    raise kind("the disk is gone")


def error_of(group: dist.ProcessGroup | None, kind: type[Exception]) -> type[Exception]:
    with pytest.raises(Exception, match="the disk is gone") as raised:
        from_rank_0(group, lambda: fail(kind))
    return raised.type


def error_of_rank_1(group: dist.ProcessGroup) -> str:
    """Raised on every rank, and what ranks do next is in step."""
    with pytest.raises(RuntimeError) as raised:
        exchange(group, lambda: 1 / (1 - dist.get_rank()), lambda ranks: fail(ValueError))
    return str(raised.value)


def talk() -> tuple[list[list[float]], list[object], list[object]]:
    with process_group(0.5):
        group = build_host_groups(0.5).control
        background, rank = BackgroundSum(group), dist.get_rank()
        sums = []
        for step in range(3):
            background.start([float(rank == 1 and step == 1), 8, rank])
            sums.append(background.wait())
        answers = [
            from_rank_0(group, only_on_rank_0), any_rank(group, rank == 2), any_rank(group, False),
            number_from_rank_0(group, 0.1 + rank), gather_objects(group, 2 * rank),
        ]  # fmt: skip
        errors = [error_of(group, kind) for kind in (OSError, StorageError, Restartable, KeyError)]
        errors.append(error_of_rank_1(group))
        answers += [exchange(group, dist.get_rank, sum), agree(group, dist.get_rank) - rank]
        destroy_groups()
    return sums, answers, errors


def test_every_rank_gets_the_same_sums_answers_and_errors() -> None:
    for sums, answers, errors in run_ranks(3, talk):
        assert sums == [[0, 24, 3], [1, 24, 3], [0, 24, 3]]
        assert answers == ["seen by rank 0", True, False, 0.1, [0, 2, 4], 3, 0]
        assert errors[:4] == [ValueError, StorageError, Restartable, RuntimeError]
        assert errors[4] == "rank 1: ZeroDivisionError: division by zero"


def test_one_process_agrees_with_itself() -> None:
    background = BackgroundSum(None)
    background.start([4, 1])
    assert background.wait() == [4, 1]
    assert from_rank_0(None, lambda: 5) == 5
    assert any_rank(None, True)
    assert (number_from_rank_0(None, 0.5), gather_objects(None, "x")) == (0.5, ["x"])
    assert (exchange(None, lambda: 2, sum), agree(None, lambda: 3)) == (2, 3)
    assert (error_of(None, OSError), error_of(None, KeyError)) == (ValueError, KeyError)
