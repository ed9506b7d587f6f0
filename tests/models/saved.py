"""How much memory autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], object], without: Iterable[Tensor]) -> int:
    """Bytes of the storages that ``forward`` saves, each counted once; those of ``without`` (parameters,
    which are there anyway) not at all. What it returns is held meanwhile, so no storage is freed."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(found.values())
