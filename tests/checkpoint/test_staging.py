"""Host copies of what a rank writes: their form, their memory, and when they are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.checkpoint import staging as module
from mmmoe_pretrain.checkpoint.files import Entry, write_tensors
from mmmoe_pretrain.checkpoint.staging import Staging
from mmmoe_pretrain.checkpoint.storage import LocalStorage


def copied(staging: Staging, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return staging.start(tensors, [True] * len(tensors)).run()


def test_staged_copies_keep_type_and_shape_whatever_the_order() -> None:
    strided = torch.rand(3, 4, dtype=torch.float64).T
    tensors = [torch.tensor([1, 2, 3], dtype=torch.int8), strided, torch.tensor(2.5), torch.empty(0, 3),
               torch.tensor([True]), torch.ones(3, dtype=torch.bfloat16), torch.rand(2)]  # fmt: skip
    staging = Staging(tensors)
    copies = copied(staging, tensors)
    for tensor, own in zip(tensors, copies, strict=True):
        assert own.dtype == tensor.dtype and own.is_contiguous() and torch.equal(own, tensor)
    again = [own.data_ptr() for own in copied(staging, [torch.zeros_like(tensor) for tensor in tensors])]
    assert again == [own.data_ptr() for own in copies]
    assert not any(bool(own.any()) for own in copies)


def test_what_is_not_steady_is_copied_at_once_and_writes_to_the_rest_are_noticed() -> None:
    tensors = [torch.zeros(4), torch.zeros(4), torch.zeros(4)]
    copying = Staging(tensors).start(tensors, [True, False, True])
    tensors[1].add_(1)
    tensors[2].view(2, 2)[1].add_(1)  # a view of what is copied
    assert [own.tolist() for own in copying.run()[:2]] == [[0.0] * 4] * 2
    assert copying.changed == [2]


def test_an_abandoned_copy_ends_before_it_is_whole_and_nobody_waits_for_it() -> None:
    tensors = [torch.ones(4), torch.ones(4)]
    copying = Staging(tensors).start(tensors, [True, True])
    copying.abandon()
    with pytest.raises(RuntimeError, match="ended while the state was copied"):
        copying.run()
    assert copying.wait() < 1.0


def test_small_tensors_are_adjacent_in_memory() -> None:
    tensors = [torch.rand(3), torch.rand(2, 2), torch.ones(3, dtype=torch.bfloat16)]
    first, second, third = copied(Staging(tensors), tensors)
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
        parts = copied(staging, tensors)
    assert max(part.nbytes for part in parts) <= 16
    assert (
        max(blocks) <= 64 and min(blocks[:-2]) > 64 - 16
    )  # full but for what one part may lack; int8 starts a new block
    found = write_tensors(storage, "f", "parts", entries, parts)
    assert (found.nbytes, found.digest) == (expected.nbytes, expected.digest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_copies_of_a_gpu_are_of_the_moment_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2**20)  # several blocks
    monkeypatch.setattr(module, "PART", 2**18)
    tensors = [torch.full((2**18 + i,), float(i), device="cuda") for i in range(8)]
    staging = Staging(tensors)
    for round_ in range(3):
        expected = [tensor.cpu() + 1 + round_ for tensor in tensors]
        for tensor in tensors:
            tensor.add_(1 + round_)  # queued before the start, perhaps run after it
        copying = staging.start(tensors, [i % 2 == 0 for i in range(len(tensors))])
        for tensor in tensors[1::2]:
            tensor.add_(1)
        copies = copying.run()
        assert copying.changed == []
        for tensor in tensors[::2]:
            tensor.add_(1)
        assert all(own.is_pinned() for own in copies)
        assert torch.equal(torch.cat(copies), torch.cat(expected))
