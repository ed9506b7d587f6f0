"""Large buffers: which memory is reused and which is not."""

from __future__ import annotations

import copy
import mmap
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.moe.cpu import buffers as module
from mmmoe_pretrain.moe.cpu.buffers import Buffers

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="pages are asked for on Linux alone")


@pytest.fixture(autouse=True)
def anything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MALLOC_RECYCLES", 1)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes in bytes of all mappings made, in order."""
    sizes: list[int] = []
    make = module._map
    monkeypatch.setattr(module, "_map", lambda size: sizes.append(size) or make(size))
    return sizes


def empty(buffers: Buffers, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return buffers.empty(shape, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 7), (1025, 1024)])
def test_a_buffer_is_an_ordinary_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = empty(Buffers(), *shape, dtype=dtype)
    assert (made.shape, made.dtype, made.is_contiguous()) == (shape, dtype, True)
    made.fill_(2)
    assert made.double().sum().item() == 2 * made.numel()
    assert torch.equal(copy.deepcopy(made), made)


@pytest.mark.parametrize(
    "hold", [lambda t: t, lambda t: t[2:4, :1].t(), lambda t: t.numpy()[1:], lambda t: t.detach()]
)
def test_memory_that_somebody_holds_is_left_alone(hold: Callable[[Tensor], Any], maps: list[int]) -> None:
    buffers = Buffers()
    first = empty(buffers, 10, 10).fill_(1)
    held = hold(first)
    del first
    empty(buffers, 10, 10).fill_(2)
    empty(buffers, 10, 10).fill_(3)
    assert (torch.as_tensor(held) == 1).all()
    assert maps == [400, 400]


def test_sizes_that_vary_do_not_pile_up(maps: list[int]) -> None:
    buffers = Buffers()
    for rows in (100, 101, 102, 60, 103, 99):
        weight_gradient, tokens = empty(buffers, 1000, 10), empty(buffers, rows, 10)
        del weight_gradient, tokens
    # Fewer rows fit where more have been; more take new memory, and the old is let go.
    assert maps == [40_000, 4_000, 4_040, 4_080, 4_120]
    assert sorted(pages.size for pages in buffers._pages) == [4_120, 40_000]


def test_what_is_held_while_another_takes_new_memory_is_taken_again_later(maps: list[int]) -> None:
    buffers = Buffers()
    gradient = empty(buffers, 10, 10)
    tokens = empty(buffers, 11, 10)  # a little larger: the gradient's memory would not do, but is in use
    del gradient
    assert empty(buffers, 10, 10).data_ptr() != tokens.data_ptr()
    assert maps == [400, 440]


def test_a_kernel_without_huge_pages_serves_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert empty(Buffers(), 4, 4).fill_(1).sum().item() == 16


def test_small_buffers_are_left_to_the_allocator(monkeypatch: pytest.MonkeyPatch, maps: list[int]) -> None:
    monkeypatch.setattr(module, "MALLOC_RECYCLES", 400)
    buffers = Buffers()
    assert empty(buffers, 10, 10).shape == (10, 10)
    assert buffers.empty((10, 11), torch.float32, torch.device("meta")).is_meta
    assert maps == []
    assert empty(buffers, 10, 11).shape == (10, 11)
    assert maps == [440]


def test_copies_have_memory_of_their_own() -> None:
    buffers = Buffers()
    empty(buffers, 10, 10)
    for twin in (copy.deepcopy(buffers), pickle.loads(pickle.dumps(buffers))):
        assert isinstance(twin, Buffers)
        assert twin._pages == []
