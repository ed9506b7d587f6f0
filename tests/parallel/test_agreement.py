"""Values and errors that ranks share: from rank 0, of any rank, gathered, or summed beside other work."""

import ast
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.storage import StorageError
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.parallel.agreement import (
    BackgroundSum,
    agree,
    any_rank,
    exchange,
    exchange_distinct,
    exchange_each,
    from_rank_0,
    gather_objects,
    number_from_rank_0,
)
from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

SEND = dist.send_object_list


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


def distinct() -> tuple[object, list[str], int]:
    """What rank 0 is given of values that ranks have alike, what this rank sent, and its own answer."""
    rank, group = dist.get_rank(), dist.group.WORLD
    sent: list[str] = []
    with mock.patch.object(
        dist, "send_object_list", lambda values, **kwargs: (sent.append(values[0]), SEND(values, **kwargs))
    ):
        found = exchange_distinct(group, lambda: "ab"[rank == 1], lambda values, which: (values, which))
    with pytest.raises(ValueError, match="the disk is gone"):
        exchange_distinct(group, lambda: fail(OSError) if rank == 2 else None, lambda values, which: None)
    with pytest.raises(ValueError, match="the disk is gone"):
        exchange_each(group, lambda: None, lambda ranks: fail(OSError))
    return found, sent, exchange_each(group, lambda: 10 * rank, lambda ranks: [sum(ranks) + r for r in ranks])


def separate() -> tuple[object, list[str], int]:
    with process_group(0.5):
        return distinct()


def test_a_value_that_several_ranks_have_is_sent_once_and_each_rank_gets_its_own_answer() -> None:
    for rank, (found, sent, own) in enumerate(run_ranks(4, separate)):
        assert found == (["a", "b"], [0, 1, 0, 0])
        assert sent == (["b"] if rank == 1 else [])
        assert own == 60 + 10 * rank  # the sum of 0, 10, 20 and 30, and its own


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
    assert exchange_each(None, lambda: 2, lambda ranks: [str(ranks)]) == "[2]"
    assert exchange_distinct(None, lambda: 2, lambda values, which: (values, which)) == ([2], [0])
    assert (error_of(None, OSError), error_of(None, KeyError)) == (ValueError, KeyError)


def test_objects_are_exchanged_by_one_module_alone_and_over_gloo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would copy them to the device and back."""
    root, callers = Path(__file__).parents[2], set()
    for folder in ("mmmoe_pretrain", "benchmarks", "launch"):
        for path in (root / folder).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if names & set(OBJECT_COLLECTIVES):
                callers.add(path.relative_to(root).as_posix())
    stand_in = "benchmarks/control/ranks.py"  # for those functions; it sends nothing
    assert callers == {"mmmoe_pretrain/parallel/agreement.py", stand_in}
    with process_group(1):
        group = dist.group.WORLD
        assert (gather_objects(group, 1), from_rank_0(group, lambda: 2)) == ([1], 2)
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        for action in (
            lambda: gather_objects(group, 1),
            lambda: from_rank_0(group, lambda: 1),
            lambda: exchange(group, lambda: 1, sum),
        ):
            with pytest.raises(AssertionError, match="objects go through gloo, not nccl"):
                action()


OBJECT_COLLECTIVES = (
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list",
    "send_object_list",
)  # fmt: skip
