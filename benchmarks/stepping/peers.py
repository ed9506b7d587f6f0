"""The expert layers of DeepSpeed and megatron-core in the place of ours, and DeepSpeed's engine around one.

Each is its library's own code: gate or router, dispatch over two ranks, experts, balance loss. All route
by softmax, two experts a token, weights divided by their sum, nothing dropped; experts are SwiGLU without
biases and start from our weights. DeepSpeed makes room for its busiest expert in all; megatron-core's
settings are those that were fastest on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer.peers import SwiGLU, make_megatron_layer
from benchmarks.layer.workload import Point
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import StepResult, loss_sums, losses_of
from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.groups import Groups

MEGATRON, DEEPSPEED = "megatron", "deepspeed"


class PeerLayer(MoELayer):
    """Stands in a block where ``MoELayer`` did. It brings no statistics of ours: routing losses are its own."""

    def __init__(self, ours: MoELayer, groups: Groups, balance: float) -> None:
        nn.Module.__init__(self)
        self.balance = balance
        self.layer: Any = self.build(ours, groups)

    def build(self, ours: MoELayer, groups: Groups) -> nn.Module:
        """The library's layer with the weights of ours."""
        raise NotImplementedError


class MegatronLayer(PeerLayer):
    """``MoELayer`` over ``SequentialMLP`` and the all-to-all dispatcher; its router attaches the balance loss."""

    def build(self, ours: MoELayer, groups: Groups) -> nn.Module:
        point, up, down = point_of(ours), *expert_weights(ours)
        kind = "aux_loss" if self.balance else "none"
        layer = make_megatron_layer(
            point,
            expert_model_parallel_size=groups.expert_size,
            moe_router_load_balancing_type=kind,
            moe_aux_loss_coeff=self.balance,
        )
        layer.set_layer_number(1)
        take_weights(layer.router.weight, ours.router.weight)
        for e, expert in enumerate(layer.experts.local_experts):
            take_weights(expert.linear_fc1.weight, up[e])
            take_weights(expert.linear_fc2.weight, down[e])
        return layer

    def forward(self, x_nD: Tensor, tokens: TokenInfo, memory_tR: Tensor | None = None) -> Any:
        return self.layer(x_nD[:, None])[0][:, 0], None


class DeepSpeedLayer(PeerLayer):
    """``deepspeed.moe.layer.MoE`` with drop_tokens off. ``auxiliary``: its balance loss of the last pass,
    which the user adds to the loss. Sampling of the second expert is off: it would be another function."""

    auxiliary: Tensor

    def build(self, ours: MoELayer, groups: Groups) -> nn.Module:
        from deepspeed.moe.layer import MoE

        point, up, down = point_of(ours), *expert_weights(ours)
        with contextlib.redirect_stdout(None):
            layer = MoE(
                point.hidden_size,
                SwiGLU(point, point.expert_hidden_size),
                num_experts=point.experts,
                ep_size=groups.expert_size,
                k=point.top_k,
                drop_tokens=False,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
        take_weights(layer.deepspeed_moe.gate.wg.weight, ours.router.weight)
        for e, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            take_weights(expert.up.weight, up[e])
            take_weights(expert.down.weight, down[e])
        return layer

    def forward(self, x_nD: Tensor, tokens: TokenInfo, memory_tR: Tensor | None = None) -> Any:
        out, self.auxiliary, _ = self.layer(x_nD[None])
        return out[0], None


def point_of(ours: MoELayer) -> Point:
    """The sizes of a layer of ours, as the benchmark of the layer gives them."""
    config, (up, _) = ours.config, expert_weights(ours)
    return Point(
        tokens=0,
        experts=config.num_experts,
        top_k=config.experts_per_token,
        hidden_size=up.shape[2],
        expert_hidden_size=config.expert_hidden_size,
    )


def expert_weights(ours: MoELayer) -> tuple[Tensor, Tensor]:
    """[E_local, 2F, D] and [E_local, D, F]."""
    assert isinstance(ours.experts, Experts)
    return ours.experts.up, ours.experts.down


@torch.no_grad()
def take_weights(theirs: Tensor, ours: Tensor) -> None:
    assert theirs.shape == ours.shape, (theirs.shape, ours.shape)
    theirs.copy_(ours)


def replace_moe_layers(model: PretrainingModel, layer: type[PeerLayer]) -> None:
    """Put ``layer`` where the model's blocks have our MoE layer, all before an engine takes the model."""
    for block in model.modules():
        if isinstance(block, Block) and isinstance(block.ffn, MoELayer):
            block.ffn = layer(block.ffn, model.groups, model.config.moe.losses.balance)


class DeepSpeedEngine:
    """A model with ``DeepSpeedLayer`` under DeepSpeed's engine, as in its documentation: expert parameters in
    separate groups, torch's AdamW, no ZeRO."""

    def __init__(self, model: PretrainingModel, config: RunConfig) -> None:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        settings = config.optimizer
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        parameters = split_params_into_different_moe_groups_for_optimizer(
            [
                {"name": "matrices", "params": matrices, "weight_decay": settings.weight_decay},
                {"name": "vectors", "params": vectors, "weight_decay": 0.0},
            ]
        )
        own = settings.own  # of AdamW
        betas = own["beta1"], own["beta2"]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=betas, eps=own["eps"])
        given = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.clip_norm,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 10**9,
        }
        with contextlib.redirect_stdout(None):
            self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=given)[0]
        self.groups, self.balance, self.objectives = model.groups, config.moe.losses.balance, model.objectives
        self.layers = [module for module in model.modules() if isinstance(module, DeepSpeedLayer)]

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step on one microbatch. Neither norm nor routing is reported."""
        (batch,) = microbatches
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = step_counts(microbatches, self.objectives, self.groups.data, batch.valid.device)
        self.engine.module.begin_step(0, counts)
        loss, report = self.engine(batch)
        if self.balance:  # a mean over the layers, as ours
            auxiliary = torch.stack([layer.auxiliary for layer in self.layers]).mean()
            loss = loss + self.balance * auxiliary
        self.engine.backward(loss)
        self.engine.step()
        names = list(report.losses)
        sums = loss_sums([report], names, self.groups, loss.device)
        return StepResult(losses_of(sums.tolist(), names, self.groups), math.nan, counts, ())
