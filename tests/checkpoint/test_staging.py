"""Host copies of what a rank writes: their form, their memory, and when they are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.checkpoint import saver as module
from mmmoe_pretrain.checkpoint.files import Entry, write_tensors
from mmmoe_pretrain.checkpoint.saver import Staging
from mmmoe_pretrain.checkpoint.storage import LocalStorage


def test_staged_copies_keep_type_and_shape_whatever_the_order() -> None:
    strided = torch.rand(3, 4, dtype=torch.float64).T
    tensors = [torch.tensor([1, 2, 3], dtype=torch.int8), strided, torch.tensor(2.5), torch.empty(0, 3),
               torch.tensor([True]), torch.ones(3, dtype=torch.bfloat16), torch.rand(2)]  # fmt: skip
    staging = Staging(tensors)
    copies = staging.fill(tensors)
    for tensor, copied in zip(tensors, copies, strict=True):
        assert copied.dtype == tensor.dtype and copied.is_contiguous() and torch.equal(copied, tensor)
    again = [copied.data_ptr() for copied in staging.fill([torch.zeros_like(tensor) for tensor in tensors])]
    assert again == [copied.data_ptr() for copied in copies]
    assert not any(bool(copied.any()) for copied in copies)


def test_small_tensors_are_adjacent_in_memory() -> None:
    tensors = [torch.rand(3), torch.rand(2, 2), torch.ones(3, dtype=torch.bfloat16)]
    first, second, third = Staging(tensors).fill(tensors)
    assert second.data_ptr() == first.data_ptr() + 12 and third.data_ptr() == second.data_ptr() + 16


def test_large_tensors_are_cut_into_parts_that_make_up_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [torch.rand(1, 5, 7), torch.rand(3), torch.rand(2, 20, 3).transpose(0, 1), torch.empty(0, 4),
               torch.rand(90, 1).T, torch.tensor(2.5), torch.arange(50, dtype=torch.int8)]  # fmt: skip
    entries = [Entry(str(i), tensor.dtype, tuple(tensor.shape)) for i, tensor in enumerate(tensors)]
    storage = LocalStorage(str(tmp_path))
    storage.make_folder("f")
    expected = write_tensors(storage, "f", "whole", entries, tensors)
    blocks, make = [], torch.empty
    with monkeypatch.context() as patched:
        patched.setattr(module, "PART", 16)
        patched.setattr(module, "BLOCK", 64)
        patched.setattr(torch, "empty", lambda n, **more: blocks.append(n) or make(n, **more))
        staging = Staging(tensors)
        parts = staging.fill(tensors)
    assert max(part.nbytes for part in parts) <= 16
    assert (
        max(blocks) <= 64 and min(blocks[:-2]) > 64 - 16
    )  # full but for what one part may lack; int8 starts a new block
    found = write_tensors(storage, "f", "parts", entries, parts)
    assert (found.nbytes, found.digest) == (expected.nbytes, expected.digest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_copies_of_a_gpu_are_whole_when_fill_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2**20)  # several blocks
    monkeypatch.setattr(module, "PART", 2**18)
    tensors = [torch.full((2**18 + i,), float(i), device="cuda") for i in range(8)]
    staging = Staging(tensors)
    for round_ in range(3):
        expected = [tensor.cpu() for tensor in tensors]
        copies = staging.fill(tensors)
        for tensor in tensors:
            tensor.add_(1 + round_)
        assert all(copied.is_pinned() for copied in copies)
        assert torch.equal(torch.cat(copies), torch.cat(expected))
