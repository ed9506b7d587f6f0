"""Memory of one microbatch in a pipeline stage, by running the real model on fake tensors: shapes and storages
without numbers.

Collectives are those of process groups that do not communicate (``build.pretended_groups``). Numbers that the host
would read from the device, which are sizes of dispatch, are answered as if routing were balanced, but for a given
imbalance of what arrives. Gradients of parameters are dropped when they have been made, since an engine adds them to
buffers of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from mmmoe_pretrain.batch import Batch, map_leaves
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.models.block import stream_width
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.objectives import StepCounts
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import forget_buffers
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.build import meta_models
from mmmoe_pretrain.plan.communication import routed_of
from mmmoe_pretrain.plan.compiled import hold_as_compiled
from mmmoe_pretrain.plan.gpu_paths import gpu_paths, replaced
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.whole_step import NONE, WholeStep, whole_step

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Imbalance:
    """Of routing: assignments that come to the fullest ``rank`` of an MoE layer, and to its fullest ``expert``, each
    over an even share. On a GPU only the rank's matters."""

    rank: float = 1.0
    expert: float = 1.0


BALANCED = Imbalance()


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one microbatch. ``kept``: from its forward to its backward pass, what it received and sends included.
    ``forward``, ``backward``: the peak of either pass, over what was there before the microbatch."""

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class StageSizes:
    """``buffers``: bytes that its first microbatch makes and that stay (megatron-core's, of gathered rows).
    ``whole_step``: of losses over all microbatches."""

    memory: StageMemory
    buffers: int
    whole_step: WholeStep = NONE


def stage_memory(
    config: RunConfig,
    groups: Groups,
    stage: Stage,
    batch: Batch,
    imbalance: Imbalance = BALANCED,
    device: Device = "cuda",
    live: LiveTensors | None = None,
    paths: Callable[[], AbstractContextManager[None]] = gpu_paths,
) -> StageSizes:
    """Of ``stage`` under ``groups`` (``build.pretended_groups``). ``live`` sees all operations of both passes;
    ``paths`` are entered for them on a GPU."""
    (model,) = meta_models(config, groups, [stage])
    answers = Answers(config.moe, batch.num_valid, imbalance)
    answers.follow(model)
    counts = StepCounts(batch.num_valid, dict.fromkeys(model.objectives.losses, 1))
    live = live or LiveTensors()
    forget_buffers()
    with FakeTensorMode(allow_non_fake_inputs=True), answers.given(), ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(paths())
        materialise(model)
        if config.train.compile == "blocks":
            hold_as_compiled(model, live)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if groups.sequence_parallel:
            _pass(model, batch, counts, live, device)
            gc.collect()
        buffers = live.live
        found = _pass(model, batch, counts, live, device)
    forget_buffers()
    return StageSizes(found, buffers, whole_step(config, groups, batch) if stage.last else NONE)


def _pass(
    model: PretrainingModel, batch: Batch, counts: StepCounts, live: LiveTensors, device: Device
) -> StageMemory:
    """Forward and backward of one microbatch; its copy on a GPU counts. Of losses over a whole step their surrogates
    count, as in the second pass."""
    stage, rows = model.stage, batch.num_valid
    if model.groups.sequence_parallel:
        rows = -(-rows // model.groups.tensor_size)
    shape = (rows, stream_width(model.config.model, model.config.moe))
    model.begin_step(0, counts)
    if stage.last and model.objectives.whole_step:
        model.begin_look("collecting")
        with torch.no_grad():
            model(batch, None if stage.first else torch.empty(shape, dtype=model.mmmoe.compute_dtype))
        model.end_look()
        model.begin_step(0, counts)
    with live:
        before = live.live
        live.reset_peak()
        received, sent = None, 0
        if not stage.first:
            received = torch.empty(shape, dtype=model.mmmoe.compute_dtype).requires_grad_()
            earlier = torch.empty_like(received)  # megatron-core's schedules hold the gradient that they sent last
            sent = earlier.nbytes
        output, report = model(map_leaves(batch, Tensor, torch.clone) if device == "cuda" else batch, received)
        kept, forward = live.live - sent, live.peak
        live.reset_peak()
        output.backward(None if stage.last else torch.empty_like(output))
        backward = live.peak
        del output, report, received
    model.end_step(None)
    return StageMemory(kept - before, forward - before, backward - before)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def materialise(model: nn.Module) -> None:
    """Give the parameters and buffers of a model on the device ``meta`` fake memory on the CPU, within a
    FakeTensorMode; a fake tensor cannot change its device in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                new.__dict__.update({k: v for k, v in parameter.__dict__.items() if k not in new.__dict__})
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass
class Answers:
    """Sizes of dispatch of an MoE layer of a rank with ``tokens``, if routing were balanced. ``moe``: the settings of
    the layer that runs."""

    moe: MoEConfig
    tokens: int
    imbalance: Imbalance

    def follow(self, model: nn.Module) -> None:
        """Answer each MoE layer of ``model`` by its own settings (``moe.layers``)."""
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.register_forward_pre_hook(lambda layer, _: setattr(self, "moe", layer.config))

    @contextmanager
    def given(self) -> Iterator[None]:
        """While it is entered the host reads these from fake tensors."""
        with replaced(FakeTensor, "tolist", lambda tensor: self._numbers(tensor)):  # noqa: PLW0108  # it is bound
            yield

    @property
    def _share(self) -> float:
        """Of the choices, those that an expert computes."""
        computed = self.moe.num_experts / self.moe.router_outputs
        return computed * min(1.0, self.moe.capacity_factor or 1.0)

    def _numbers(self, tensor: Tensor) -> Any:
        experts, assignments = self.moe.num_experts, self.tokens * self.moe.experts_per_token * self._share
        if tensor.ndim == 1:  # of each local expert
            return unevenly(round(assignments), tensor.shape[0], assignments / experts * self.imbalance.expert)
        _, ranks, chunks, columns = tensor.shape  # dispatch.py: there and back; rows, then assignments by expert

        def chunk(tokens: int, imbalance: Imbalance) -> Iterator[list[int]]:
            """By rank."""
            rows = routed_of(self.moe, tokens, ranks).rows_out / (ranks - 1)
            whole = int(tokens * self.moe.experts_per_token * self._share)
            for total in evenly(int(whole * imbalance.rank), ranks):
                by_expert = unevenly(total, columns - 1, whole / ranks / (columns - 1) * imbalance.expert)
                yield [min(round(rows * imbalance.rank), total), *by_expert]

        def side(imbalance: Imbalance) -> list[list[list[int]]]:
            by_chunk = [chunk(tokens, imbalance) for tokens in evenly(self.tokens, chunks)]
            return [list(of_rank) for of_rank in zip(*by_chunk, strict=True)]

        return [side(BALANCED), side(self.imbalance)]


def evenly(total: int, parts: int) -> list[int]:
    """``total`` in whole numbers that differ by one at most."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def unevenly(total: int, parts: int, largest: float) -> list[int]:
    """``total`` in whole numbers, of which the first is ``largest`` (or a mean part, where that is more) and the
    others differ by one at most."""
    first = min(total, max(round(largest), -(-total // parts)))
    return [first, *evenly(total - first, parts - 1)]
