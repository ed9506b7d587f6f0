"""What ZeRO-3 must be told of our modules, so that their parameters are there when they are needed.

DeepSpeed gathers a module's parameters before its forward pass and lets them go after it; for the backward
pass it does so when a gradient reaches one of the tensors that the module returned. Two things it does not
see: the tensors in a router's ``Routing``, since it looks into tuples, lists and dicts; and that a block which
is computed again runs forward in the midst of its own backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.moe.router import Router

HELD = -1  # stands among the numbers of the modules that need a parameter, which keeps it whole


def prepare_gathering(model: nn.Module) -> Callable[[], None]:
    """Call it before ``deepspeed.initialize``, and what it returns after: hooks around DeepSpeed's own."""
    finish = [_show_routing(model), _hold_while_recomputing(model)]

    def register_the_others() -> None:
        for register in finish:
            register()

    return register_the_others


def hold(parameters: Iterable[nn.Parameter]) -> None:
    """Gather them and keep them whole until the optimizer's step: for those that are used outside a module
    of theirs."""
    held: list[Any] = list(parameters)
    if held:
        held[0].all_gather(held)
    for each in held:
        each.ds_active_sub_modules.add(HELD)


def _show_routing(model: nn.Module) -> Callable[[], None]:
    """DeepSpeed sees a list of the tensors in a ``Routing``, which is put together again behind it."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    shown: dict[nn.Module, Any] = {}

    def take_apart(router: nn.Module, args: Any, routing: Any) -> list[Tensor]:
        shown[router] = routing
        return list(_differentiable(routing))

    def put_together(router: nn.Module, args: Any, tensors: list[Tensor]) -> Any:
        return _with(shown.pop(router), iter(tensors))

    for router in routers:
        router.register_forward_hook(take_apart)

    def finish() -> None:
        for router in routers:
            router.register_forward_hook(put_together)

    return finish


def _hold_while_recomputing(model: nn.Module) -> Callable[[], None]:
    """Where a backward pass already needs a module's parameters when the module runs forward once more,
    they are not let go after that."""
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
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

    for module in owners:
        module.register_forward_pre_hook(keep)

    def finish() -> None:
        for module in owners:
            module.register_forward_hook(need_again)

    return finish


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
