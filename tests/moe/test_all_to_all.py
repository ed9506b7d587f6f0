"""What travels, in what order, and how often the host waits. What it computes: test_dispatch.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmmoe_pretrain.config import MoEConfig, ParallelConfig
from mmmoe_pretrain.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, make_dispatcher
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows
from mmmoe_pretrain.parallel.collectives import RowExchange
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks

D, NOWHERE = 8, 4
ROW, PAIR, WEIGHT = 4 * D, 8, 4  # bytes of a token's row in fp32, of an assignment's expert and weight, of a weight
# Four slots: 0 and 1 on rank 0, 2 and 3 on rank 1.
SLOTS_OF_RANK = ([[2, 3], [0, 2], [0, 1], [2, NOWHERE]], [[0, 1], [2, 3]])


def scale(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
    """The cheapest experts: each is the identity."""
    return sum_rows(take_rows(x_mD, plan) * weights_A[:, None], plan)


def tokens(slots: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    slots_nK = torch.tensor(slots, dtype=torch.int64).view(-1, 2)
    return (
        torch.ones(len(slots), D, requires_grad=True),
        slots_nK,
        torch.full(slots_nK.shape, 0.5, requires_grad=True),
    )


@contextmanager
def sent_bytes(log: list[int]) -> Iterator[None]:
    """Bytes that leave this rank for the other one, by message."""
    exchange: Callable[..., Any] = dist.all_to_all_single

    def spy(out: Tensor, x: Tensor, receive: Any = None, send: Any = None, **kwargs: Any) -> Any:
        rows = x.shape[0] // 2 if send is None else send[1 - dist.get_rank()]
        log.append(rows * x[:1].numel() * x.element_size() if len(x) else 0)
        return exchange(out, x, receive, send, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", spy):
        yield


def messages() -> dict[str, list[int]]:
    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 4)
        dispatcher = make_dispatcher(MoEConfig(num_experts=4), groups)
        x, slots, weights = tokens(SLOTS_OF_RANK[groups.expert_rank])
        log: dict[str, list[int]] = {"forward": [], "backward": [], "no_grad": []}
        with sent_bytes(log["forward"]):
            out, *_ = dispatcher.run(x, slots, weights, scale)
        with sent_bytes(log["backward"]):
            out.sum().backward()
        with sent_bytes(log["no_grad"]), torch.no_grad():
            dispatcher.run(x, slots, weights, scale)
    return log


def test_a_token_with_two_experts_on_one_rank_travels_once() -> None:
    ranks = run_ranks(2, messages)
    # Rank 0 sends tokens 0 (for two experts), 1 and 3, of 4 assignments; rank 1 sends token 0, of 2.
    for rank, (rows, assignments), (back, assignments_back) in ((0, (3, 4), (1, 2)), (1, (1, 2), (3, 4))):
        counts = 4 * (1 + 2)  # int32: rows, and assignments of each of the other's two experts
        forward = [counts, assignments * PAIR, rows * ROW, back * ROW]
        assert ranks[rank]["forward"] == ranks[rank]["no_grad"] == forward
        assert ranks[rank]["backward"] == [rows * ROW, back * ROW, assignments_back * WEIGHT]


def steps_of(chunks: int) -> list[str]:
    """The order of events on this rank, transfers with the number of their chunk; rank 1 has no tokens."""
    log: list[str] = []
    exchanges: list[RowExchange] = []  # three a chunk, in the order of chunks
    make, issue, arrive = RowExchange.__init__, RowExchange.issue, RowExchange.arrive

    def noted_make(exchange: RowExchange, *args: Any) -> None:
        exchanges.append(exchange)
        make(exchange, *args)

    def noted_issue(exchange: RowExchange, *args: Any) -> None:
        log.append(f"go {exchanges.index(exchange) // 3}")
        issue(exchange, *args)

    def noted_arrive(exchange: RowExchange) -> Tensor:
        log.append(f"wait {exchanges.index(exchange) // 3}")
        return arrive(exchange)

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
            ctx.name = name
            log.append(name)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            log.append(ctx.name)
            return grad, None

    def compute(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        return scale(Note.apply(x_mD, "compute"), weights_A, plan)

    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 4)
        x, slots, weights = tokens(SLOTS_OF_RANK[0] if groups.expert_rank == 0 else [])
        with mock.patch.multiple(RowExchange, __init__=noted_make, issue=noted_issue, arrive=noted_arrive):
            dispatcher = AllToAllDispatcher(4, groups, chunks)
            out, extra, _ = dispatcher.run(x, slots, weights, compute, lambda: Note.apply(x, "overlap"))
            log.append("backward")
            assert extra is not None
            (out + extra).sum().backward()
    return log


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_leave_before_the_first_is_computed_and_so_do_their_gradients(chunks: int) -> None:
    def each(numbers: range, *steps: str) -> list[str]:
        return [step if step == "compute" else f"{step} {c}" for c in numbers for step in steps]

    rising, falling = range(chunks), range(chunks - 1, -1, -1)
    forward = [*each(rising, "go", "go"), "overlap", *each(rising, "wait", "wait", "compute", "go")]
    forward += each(rising, "wait")
    backward = [*each(falling, "go"), *each(falling, "wait", "compute", "go", "go"), "overlap"]
    backward += each(falling, "wait", "wait")
    assert run_ranks(2, steps_of, chunks) == [[*forward, "backward", *backward]] * 2


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU: operations whose result has a size or value that the
    host needs."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.total += 1
        masks = any(
            isinstance(a, Tensor) and a.dtype == torch.bool for a in (args[1] if "index.Tensor" in name else ())
        )
        if masks or any(word in name for word in self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class ListReads(TorchFunctionMode):
    """The same for methods that read memory without an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dispatcher", [LocalDispatcher(4), AllToAllDispatcher(4, SINGLE, num_chunks=3)], ids=str)
def test_the_host_waits_once_forward_and_never_backward(dispatcher: Dispatcher) -> None:
    x, slots, weights = tokens(SLOTS_OF_RANK[0])
    with HostReads() as operations, ListReads() as methods:
        out, *_ = dispatcher.run(x, slots, weights, scale)
        assert (methods.seen, operations.seen) == (["tolist"], [])
        forward = operations.total
        out.sum().backward()
    assert operations.total > forward, "the backward pass went unseen"
    assert (methods.seen, operations.seen) == (["tolist"], [])
