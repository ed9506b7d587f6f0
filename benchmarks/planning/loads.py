"""What came to each expert in the steps of an engine, whose plan is then made for that imbalance."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.forked import slowest_rank
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.plan.activations import BALANCED, Imbalance


class Loads:
    """Counts of assignments at the dispatchers of a rank's MoE layers: ``sent`` to each slot, by layer and forward
    pass, without those that a backward pass repeats."""

    def __init__(self, engine: Any) -> None:
        self.groups, self.sent = engine.groups, list[list[Tensor]]()
        modules = [module for model in engine.models for module in model.modules()]
        self._layers = [module for module in modules if isinstance(module, MoELayer)]
        self._dispatchers = [layer.dispatcher for layer in self._layers]
        for layer in self._layers:
            self.sent.append([])
            listening: Any = SimpleNamespace(run=self._listen(layer, self.sent[-1]))
            layer.dispatcher = listening

    def _listen(self, layer: MoELayer, sent: list[Tensor]) -> Any:
        run, slots = layer.dispatcher.run, layer.config.num_experts

        def listen(x_nD: Tensor, slots_nK: Tensor, *rest: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:  # not within a backward pass
                sent.append(torch.bincount(slots_nK.flatten(), minlength=slots + 1)[:slots])
            return run(x_nD, slots_nK, *rest)

        return listen

    def remove(self) -> None:
        for layer, dispatcher in zip(self._layers, self._dispatchers, strict=True):
            layer.dispatcher = dispatcher

    def forget(self) -> None:
        for sent in self.sent:
            sent.clear()

    def _came(self) -> list[Tensor]:
        """[passes, slots] of each layer, over all expert ranks."""
        came = [torch.stack(sent) for sent in self.sent]
        if self.groups.expert_size > 1:
            for counts in came:
                dist.all_reduce(counts, group=self.groups.expert)
        return came

    def imbalance(self, of_one_layer: bool) -> Imbalance:
        """Of the microbatch and, if ``of_one_layer``, the layer in which most came to this rank; else the mean of its
        layers, whose activations are kept together."""
        if not self.sent:
            return BALANCED
        came, ranks, rank = self._came(), self.groups.expert_size, self.groups.expert_rank
        own = torch.stack([counts.chunk(ranks, dim=1)[rank] for counts in came]).double()  # [layers, passes, slots]
        even = torch.stack(came).double().mean(-1)  # of a slot
        of_rank = own.mean(-1) / even
        of_rank = of_rank.amax(0) if of_one_layer else of_rank.mean(0)
        return Imbalance(float(of_rank.max()), float((own.amax(-1) / even).max()))

    def fullest_rank(self) -> float:
        """What came to the fullest expert rank, for which the others wait, over an even share: the mean over layers
        and passes of the pipeline rank where it is largest."""
        ranks = self.groups.expert_size
        of_stage = [counts.unflatten(1, (ranks, -1)).double().sum(-1) for counts in self._came()]  # [passes, ranks]
        own = [float((counts.amax(-1) / counts.mean(-1)).mean()) for counts in of_stage]
        return slowest_rank(statistics.fmean(own) if own else 1.0)
