"""Work side by side: everything is done once, on one thread each, and errors and settings come back."""

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.moe.cpu.threads import ROWS_FOR_ALL_THREADS, run_side_by_side

CPU = torch.device("cpu")
SMALL = [1] * 8
LARGE = ROWS_FOR_ALL_THREADS * 2  # for two threads
PATIENCE = 10.0  # seconds to wait for the other thread; it is there in less than one


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def is_caller() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_everything_is_done_once_small_work_on_one_thread_and_large_on_all() -> None:
    rows = [1, LARGE, 2, 3, LARGE + 1, 4, *[LARGE - 1] * 3, 0]
    done: list[tuple[int, int]] = []
    run_side_by_side(lambda i: done.append((i, torch.get_num_threads())), rows, CPU)
    assert sorted(done) == [(i, 2 if n >= LARGE else 1) for i, n in enumerate(rows)]
    done.clear()
    run_side_by_side(lambda i: done.append((i, torch.get_num_threads())), [LARGE, *SMALL], CPU)
    assert sorted(done) == [(i, 2) for i in range(9)]  # where most of the work is large, all of it takes all threads
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # and a new thread gets the number of the process
        assert pool.submit(torch.get_num_threads).result() == 2


def test_a_fork_has_threads_of_its_own() -> None:
    run_side_by_side(lambda i: None, SMALL, CPU)  # this process has its threads now

    def child(results: multiprocessing.SimpleQueue) -> None:
        done: list[int] = []
        run_side_by_side(done.append, SMALL, CPU)
        results.put(sorted(done))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=child, args=(results,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert results.get() == list(range(8))


def test_too_little_work_stays_with_the_caller() -> None:
    by_caller: list[bool] = []
    run_side_by_side(lambda i: by_caller.append(is_caller() and torch.get_num_threads() == 2), [1, 1, 1], CPU)
    assert by_caller == [True] * 3
    run_side_by_side(lambda i: pytest.fail("there was nothing to do"), [], CPU)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_either_thread_reaches_the_caller_after_the_other_has_ended(failing: int) -> None:
    met, done = threading.Barrier(2), []

    def work(index: int) -> None:
        if index < 2:
            met.wait(PATIENCE)  # so that each thread has one of the first two
            if index == failing:
                raise FloatingPointError(f"work {index}")
        done.append(index)

    with pytest.raises(FloatingPointError, match=f"work {failing}"):
        run_side_by_side(work, [LARGE - 1, LARGE - 1, *SMALL], CPU)
    assert torch.get_num_threads() == 2
    assert sorted(done) == [i for i in range(10) if i != failing]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_helpers_work_in_the_callers_mode(mode: type) -> None:
    with mode():
        out = torch.zeros(10, 3)
        modes: list[tuple[bool, bool]] = []
        met = threading.Barrier(2)

        def work(index: int) -> None:
            if index < 2:
                met.wait(PATIENCE)
            out[index].add_(1)  # refused on a tensor of inference mode from outside of it
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        run_side_by_side(work, [1] * 10, CPU)
    assert set(modes) == {(False, mode is torch.inference_mode)}
    assert out.eq(1).all()


def test_a_counter_of_operations_sees_all_of_them() -> None:
    a = torch.ones(4, 4)
    with FlopCounterMode(display=False) as counter:
        run_side_by_side(lambda i: torch.mm(a, a), SMALL, CPU)
    assert counter.get_total_flops() == 8 * 2 * 4**3
