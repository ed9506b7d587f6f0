"""What functions of blocks hold under ``train.compile: blocks``, on fake tensors.

torch.compile keeps for the backward pass what the partitioner of AOTAutograd chooses (min-cut rematerialisation),
which is less than the functions keep by themselves. Here AOTAutograd makes the same forward and backward graphs by
inductor's decompositions, passes and partitioner. A graph is not compiled; what it makes on the way does not count,
since inductor's kernels fuse it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmmoe_pretrain import kernels
from mmmoe_pretrain.models.compiling import FUNCTIONS, exchange
from mmmoe_pretrain.plan.gpu_paths import replaced
from mmmoe_pretrain.plan.live import LiveTensors, storages


def hold_as_compiled(model: nn.Module, live: LiveTensors) -> None:
    """Let the blocks in ``model`` hold under ``live`` what they would hold compiled."""
    exchange(model, *(_Compiled(function, live) for function in FUNCTIONS))


class _Compiled:
    """``function`` of tensors and numbers; it is traced once for each shape and type of what it gets."""

    def __init__(self, function: Callable[..., Any], live: LiveTensors) -> None:
        self._function, self._live = function, live
        self._traced: dict[object, Callable[..., Any]] = {}

    def __call__(self, *given: Any) -> Any:
        places = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
        tensors = [given[place] for place in places]
        key = (torch.is_grad_enabled(), *(_signature(value) for value in given))
        if key not in self._traced:
            others = [None if isinstance(value, Tensor) else value for value in given]  # nothing holds the tensors
            traced = self._traced[key] = _trace(functools.partial(_call, self._function, others, places), self._live)
            # The kernels as while torch compiles; and recomputation must not see what this call saves.
            with self._live.paused(), replaced(kernels, "usable", lambda x: False), saved_tensors_hooks(_same, _same):
                traced(*map(_like, tensors))  # AOTAutograd holds on to these
        return self._traced[key](*tensors)


def _same(saved: Tensor) -> Tensor:
    return saved


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad)


def _call(function: Callable[..., Any], others: Sequence[Any], places: Sequence[int], *tensors: Tensor) -> Any:
    """``function`` with ``tensors`` at their ``places`` among the ``others``."""
    arguments = list(others)
    for place, tensor in zip(places, tensors, strict=True):
        arguments[place] = tensor
    return function(*arguments)


def _signature(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    return value


def _trace(function: Callable[..., Any], live: LiveTensors) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import aot_function  # here: seconds to import, for configs that compile
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    def make(gm: Any, example_inputs: Any) -> Any:
        return _Graph(gm, live)

    return aot_function(function, make, make, partition_fn, select_decomp_table())


class _Graph:
    """A graph's call, of which only outputs are new. ``_boxed_call``: it may drop its inputs, as inductor's code
    does."""

    _boxed_call = True

    def __init__(self, graph: Callable[..., Any], live: LiveTensors) -> None:
        self._graph, self._live = graph, live

    def __call__(self, inputs: list[Any]) -> Any:
        before = storages(inputs)
        with self._live.paused():
            outputs = self._graph(*inputs)
        inputs.clear()
        self._live.count(outputs, before)
        return outputs
