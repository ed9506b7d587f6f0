"""bf16 and fp16 under DeepSpeed: parameters stay fp32, and the modules of the trunk compute with half copies.

DeepSpeed's own ``bf16`` and ``fp16`` modes cast every parameter, also those that we keep in fp32 on purpose (vectors,
routers, embedders, heads), and its ZeRO-3 knows one type for all parameters of a model. So it is given an
fp32 model: what it partitions is the master weight, and gradients are accumulated and reduced in fp32, as
by our other engine. The price is 2 bytes a parameter of the unsharded model (ZeRO 0 to 2), and twice the
bytes of ZeRO-3's gathers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.models.pretraining import PretrainingModel


def compute_in_half(model: PretrainingModel, dtype: torch.dtype, cast_again: bool) -> None:
    """``PretrainingModel.use_half``, but the parameters themselves keep fp32 (rounded once, to what the
    half model would begin with). Each module that has half ones finds half copies in their place while it
    runs. ``cast_again``: the backward pass casts anew instead of keeping the copies; with ZeRO-3 they
    would add up to the model. Not within recomputed blocks, which keep none of them, and whose own hooks
    on saved tensors these would displace.
    """
    model.use_half(dtype)
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        names = [name for name, parameter in own.items() if parameter.dtype == dtype]
        for name in names:
            own[name].data = own[name].data.float()
        if names:
            module.forward = _InHalf(module, names, dtype, cast_again)


class _InHalf:
    """The forward pass of ``module`` with copies in place of its parameters ``names``."""

    def __init__(self, module: nn.Module, names: list[str], dtype: torch.dtype, cast_again: bool) -> None:
        self.module, self.names, self.dtype, self.cast_again = module, names, dtype, cast_again
        self.forward: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        copies = {name: getattr(self.module, name).to(self.dtype) for name in self.names}
        attributes = vars(self.module)  # found before the parameters of the same names
        attributes.update(copies)
        try:
            with self._without_keeping(copies):
                return self.forward(*args, **kwargs)
        finally:
            for name in copies:
                del attributes[name]

    @contextlib.contextmanager
    def _without_keeping(self, copies: dict[str, Tensor]) -> Iterator[None]:
        if not (self.cast_again and torch.is_grad_enabled()):
            yield
            return
        name_of = {copy.untyped_storage().data_ptr(): name for name, copy in copies.items()}

        def pack(saved: Tensor) -> Any:
            name = name_of.get(saved.untyped_storage().data_ptr())
            return saved if name is None else (name, saved.size(), saved.stride(), saved.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, *view = packed
            return getattr(self.module, name).detach().to(self.dtype).as_strided(*view)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
