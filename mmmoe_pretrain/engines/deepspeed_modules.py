"""Adapts our modules to DeepSpeed: ZeRO-3 gathering of parameters, and half precision.

ZeRO-3 gathers a module's parameters before its forward pass and releases them after it; for the backward pass it does
so when a gradient reaches one of the tensors that the module returned. Two things it does not handle: the tensors in
a router's ``Routing``, since it looks into tuples, lists and dicts; and that a block which is computed again runs
forward in the midst of its own backward pass.

bf16 and fp16: parameters stay fp32, and the modules of the trunk compute with half copies. DeepSpeed's own ``bf16``
and ``fp16`` modes cast every parameter, also those that we keep in fp32 on purpose (vectors, routers, embedders,
heads), and its ZeRO-3 supports one type for all parameters. So it is given an fp32 model: what it partitions
is the master weight, and gradients are accumulated and reduced in fp32, as by our other engine. The price is 2 bytes
a parameter of the unsharded model (ZeRO 0 to 2), and twice the bytes of ZeRO-3's gathers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.router import Router

HELD = -1  # among the ids of the modules that need a parameter; keeps it whole


def complete_gathering(model: nn.Module) -> None:
    """Call it after ``deepspeed.initialize``: hooks before and after DeepSpeed's own."""
    _show_routing(model)
    _hold_while_recomputing(model)


def hold(parameters: Iterable[nn.Parameter]) -> None:
    """Gather them and keep them whole until the optimizer's step: for those that are used outside a module
    of theirs."""
    held: list[Any] = list(parameters)
    if held:
        held[0].all_gather(held)
    for each in held:
        each.ds_active_sub_modules.add(HELD)


def _show_routing(model: nn.Module) -> None:
    """DeepSpeed sees a list of the tensors in a ``Routing``, which is put together again behind it."""
    shown: dict[nn.Module, Any] = {}

    def take_apart(router: nn.Module, args: Any, routing: Any) -> list[Tensor]:
        shown[router] = routing
        return list(_differentiable(routing))

    def put_together(router: nn.Module, args: Any, tensors: list[Tensor]) -> Any:
        return _with(shown.pop(router), iter(tensors))

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(take_apart, prepend=True)
            module.register_forward_hook(put_together)


def _hold_while_recomputing(model: nn.Module) -> None:
    """Where a backward pass already needs a module's parameters when the module runs forward once more,
    they are not released after that."""
    needed: dict[nn.Module, list[tuple[Any, set[int]]]] = {}

    def keep(module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not within a backward pass
            return
        own: Iterable[Any] = module.parameters(recurse=False)
        needed[module] = [(p, set(p.ds_active_sub_modules)) for p in own if p.ds_active_sub_modules]
        for parameter, _ in needed[module]:
            parameter.ds_active_sub_modules.add(HELD)

    def need_again(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, modules in needed.pop(module, ()):
            parameter.ds_active_sub_modules.discard(HELD)
            parameter.ds_active_sub_modules.update(modules)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(keep, prepend=True)
            module.register_forward_hook(need_again)


def _differentiable(value: Any) -> Iterator[Tensor]:
    """Tensors with a gradient in a dataclass, and in those within it."""
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor) and part.requires_grad:
            yield part
        elif dataclasses.is_dataclass(part):
            yield from _differentiable(part)


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with ``tensors`` in place of its differentiable ones, in their order."""
    new: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor) and part.requires_grad:
            new[field.name] = next(tensors)
        elif dataclasses.is_dataclass(part):
            new[field.name] = _with(part, tensors)
    return dataclasses.replace(value, **new)


def compute_in_half(model: PretrainingModel, dtype: torch.dtype, cast_again: bool) -> None:
    """``PretrainingModel.use_half``, but the parameters themselves keep fp32 (rounded once, to what the
    half model would begin with). Each module that has half ones finds half copies in their place while it
    runs. ``cast_again``: the backward pass casts again instead of keeping the copies; with ZeRO-3 they
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
        # _cdata: fake tensors, by which a plan measures memory, have no address
        name_of = {copy.untyped_storage()._cdata: name for name, copy in copies.items()}

        def pack(saved: Tensor) -> Any:
            name = name_of.get(saved.untyped_storage()._cdata)
            return saved if name is None else (name, saved.size(), saved.stride(), saved.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, *view = packed
            return getattr(self.module, name).detach().to(self.dtype).as_strided(*view)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
