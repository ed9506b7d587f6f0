"""The time of a step by part: the wall time of one thread, attributed to one part at a time.

A part begins where its function is called and ends where it returns; in the backward pass, between two
marks that its outputs and inputs went through. Autograd runs nodes in the reverse order of their making,
so what runs between the two marks is the part's own backward pass. Waiting for another rank is charged
to the part that waits.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmmoe_pretrain.engines.megatron import MegatronEngine
from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.moe.layer import MoELayer

EMBED, ATTENTION, ROUTE, DISPATCH, EXPERTS, DENSE = "embed", "attention", "route", "dispatch", "experts", "dense"
OBJECTIVES, REDUCE, OPTIMIZER, REST = "objectives", "reduce", "optimizer", "rest"
PARTS = (EMBED, ATTENTION, ROUTE, DISPATCH, EXPERTS, DENSE, OBJECTIVES, REDUCE, OPTIMIZER, REST)


class Clock:
    """``seconds`` by part since ``restart``."""

    def __init__(self) -> None:
        self.part = REST
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def switch(self, part: str) -> None:
        """From now on ``part`` runs."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self._since
        self.part, self._since = part, now

    def shares(self) -> dict[str, float]:
        """Of all that was charged; they sum to 1."""
        self.switch(self.part)
        total = sum(self.seconds.values())
        return {part: self.seconds[part] / total for part in PARTS}


class _Mark(torch.autograd.Function):
    """The identity; its backward pass says which part runs next."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        # A view may not be changed in place, and Megatron scales the loss so.
        return tuple(tensor.view_as(tensor) if tensor.ndim else tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.switch(ctx.part)
        return (None, None, *grads)


def timed(clock: Clock, part: str, function: Callable[..., Any], outer: str | None = None) -> Callable[..., Any]:
    """``function``, charged to ``part``. What runs around it is ``outer``, by default the part that calls."""

    def run(*args: Any, **kwargs: Any) -> Any:
        around = clock.part if outer is None else outer
        args, kwargs = mark(clock, around, (args, kwargs))
        clock.switch(part)
        result = mark(clock, part, function(*args, **kwargs))
        clock.switch(around)
        return result

    return run


def mark(clock: Clock, part: str, value: Any) -> Any:
    """``value`` with all tensors in it that have a gradient led through one mark."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _exchange(value, note)
    if not found or not torch.is_grad_enabled():
        return value
    marked: Iterator[Tensor] = iter(_Mark.apply(clock, part, *found))
    return _exchange(value, lambda tensor: next(marked))


def _exchange(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``new(t)`` for every tensor that has a gradient, through tuples, dicts and dataclasses;
    what holds none stays the same object."""
    if isinstance(value, Tensor):
        return new(value) if value.requires_grad else value
    if isinstance(value, list | tuple):
        items = [_exchange(item, new) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if isinstance(value, dict):
        return {key: _exchange(item, new) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: _exchange(item, new) for name, item in old.items()}
        changed = {name: item for name, item in changed.items() if item is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def time_parts(engine: MegatronEngine) -> Clock:
    """Charge the engine's steps by part from now on, for good. One stage, its own expert layer."""
    (model,), (wrapped,) = engine.models, engine.wrapped
    clock, anything = Clock(), model.mmmoe

    def charge(owner: Any, name: str, part: str, outer: str | None = None) -> None:
        object.__setattr__(owner, name, timed(clock, part, getattr(owner, name), outer))

    charge(model, "forward", OBJECTIVES, outer=REST)
    charge(anything, "run_stage", REST)
    charge(anything, "_embed", EMBED)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        charge(block.attention, "forward", ATTENTION)
        if not isinstance(block.ffn, MoELayer):
            charge(block.ffn, "forward", DENSE)
            continue
        layer: Any = block.ffn
        charge(layer.router, "forward", ROUTE)
        layer.dispatcher = SimpleNamespace(run=timed(clock, DISPATCH, layer.dispatcher.run))
        charge(layer.experts, "forward", EXPERTS)
    charge(engine.transformer, "finalize_model_grads_func", REDUCE, outer=REST)
    of_optimizer = [(engine.optimizer, name) for name in ("zero_grad", "prepare_grads")]
    of_engine = [(engine, name) for name in ("_squared_norms", "_update")]
    for owner, name in ((wrapped, "zero_grad_buffer"), *of_optimizer, *of_engine):
        charge(owner, name, OPTIMIZER, outer=REST)
    return clock
