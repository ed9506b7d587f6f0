"""The router of one layer: its parameters, and the order in which a decision is made.

input (task embedding, jitter) -> gate (logits) -> mask (expert groups) -> router function (choice)
-> capacity -> statistics. Everything in fp32, whatever the type of x.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import MODALITY_ID, TASKS
from mmmoe_pretrain.config_moe import MoEConfig
from mmmoe_pretrain.moe.bias_balancing import updated_bias
from mmmoe_pretrain.moe.capacity import expert_capacity, within_capacity
from mmmoe_pretrain.moe.gates import GATES
from mmmoe_pretrain.moe.loss_sums import statistics
from mmmoe_pretrain.moe.routers import ROUTERS
from mmmoe_pretrain.moe.routing import MASKED, Choice, RouterInputs, Routing
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo

DORMANT = 32.0  # exp(-32) = 1.3e-14, below the resolution of fp32 beside a probability


class Router(nn.Module):
    """``weight``: [E, D]. ``task_embedding``: [X, D], if task-conditioned. ``noise_weight``: [E, D],
    of noisy_top_k. ``logit_bias``: [E], if ``router_bias``. ``bias``: buffer [1 or M, E] of bias
    balancing. E counts the experts without computation too. ``dormancy``: buffer [E], by which logits
    are lowered: ``DORMANT`` for an expert just added to a trained model, falling to 0 over
    ``wake_steps`` optimizer steps; 0 for all others.

    ``begin_step(seed)`` before each optimizer step makes jitter and noise a function of that seed, the
    layer, and ``TokenInfo.draw``.
    """

    bias: Tensor
    dormancy: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        experts = config.router_outputs
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.task_embedding = nn.Parameter(torch.zeros(len(TASKS), hidden_size)) if config.task_conditioned else None
        noisy = config.router == "noisy_top_k"
        self.noise_weight = nn.Parameter(torch.zeros(experts, hidden_size)) if noisy else None
        self.logit_bias = nn.Parameter(torch.zeros(experts)) if config.router_bias else None
        rows = len(MODALITY_ID) if config.bias_balancing.per_modality else 1
        if config.bias_balancing.on:
            self.register_buffer("bias", torch.zeros(rows, experts))
        if config.wake_steps:
            self.register_buffer("dormancy", torch.zeros(experts))
        self.register_buffer("allowed_ME", _allowed(config), persistent=False)
        self._seed = layer

    def begin_step(self, seed: int) -> None:
        self._seed = seed

    @torch.no_grad()
    def end_step(self, stats: RoutingStats) -> None:
        """After an optimizer step whose routing over all ranks and microbatches was ``stats``."""
        if self.config.bias_balancing.rate:
            allowed_ME = self.get_buffer("allowed_ME")
            if self.config.wake_steps:  # a sleeping expert takes no part: it has no load, and would only rise
                allowed_ME = allowed_ME & (self.dormancy <= 0)
            bias = updated_bias(self.bias, stats, self.config.bias_balancing.rate, allowed_ME)
            self.bias.copy_(torch.where(self.dormancy > 0, self.bias, bias) if self.config.wake_steps else bias)
        if self.config.wake_steps:
            self.dormancy.sub_(DORMANT / self.config.wake_steps).clamp_(min=0)

    def forward(self, x_nD: Tensor, tokens: TokenInfo) -> Routing:
        """[n, D] -> the experts of each token, their weights, and the sums of this rank's routing."""
        config = self.config
        generator = self._generator(tokens.draw, x_nD.device)
        seen_nD = self._input(x_nD, tokens, generator)
        logits_nE = GATES[config.gate](seen_nD, self.weight.float())
        if self.logit_bias is not None:
            logits_nE = logits_nE + self.logit_bias.float()
        if config.wake_steps:
            logits_nE = logits_nE - self.dormancy
        inputs = self._inputs(seen_nD, logits_nE, tokens, generator)
        choice = ROUTERS[config.router](inputs)
        ids_nK, kept_nK = choice.expert_ids_nK, self._kept(choice)
        allowed_ME = self.get_buffer("allowed_ME") if config.expert_groups else None
        stats = statistics(inputs, choice, kept_nK, self.weight, allowed_ME)
        stats = dataclasses.replace(stats, layer=self.layer)
        weights_nK = choice.weights_nK * (kept_nK * config.routed_scaling_factor)
        return Routing(ids_nK, weights_nK, kept_nK, stats, choice.log_p_nE)

    def _input(self, x_nD: Tensor, tokens: TokenInfo, generator: torch.Generator | None) -> Tensor:
        seen_nD = x_nD.float()
        if self.task_embedding is not None:
            seen_nD = seen_nD + self.task_embedding.float()[tokens.task_ids_n]
        if self.config.jitter and generator is not None:
            noise = torch.rand(seen_nD.shape, generator=generator, device=seen_nD.device)
            seen_nD = seen_nD * (1 + self.config.jitter * (2 * noise - 1))
        return seen_nD

    def _inputs(
        self, seen_nD: Tensor, logits_nE: Tensor, tokens: TokenInfo, generator: torch.Generator | None
    ) -> RouterInputs:
        bias_nE = None
        if self.config.bias_balancing.on:
            bias_nE = self.bias[tokens.modality_ids_n] if self.config.bias_balancing.per_modality else self.bias
            if self.config.wake_steps:  # no bias lifts a sleeping expert into the choice
                bias_nE = bias_nE - self.dormancy
        allowed_ME = self.get_buffer("allowed_ME")
        if self.config.expert_groups:
            logits_nE = logits_nE.masked_fill(~allowed_ME[tokens.modality_ids_n], MASKED)
        std_nE = normal_nE = None
        if self.noise_weight is not None and generator is not None:
            std_nE = F.softplus(F.linear(seen_nD, self.noise_weight.float()))
            normal_nE = torch.randn(logits_nE.shape, generator=generator, device=logits_nE.device)
        return RouterInputs(logits_nE, tokens, self.config, bias_nE, std_nE, normal_nE)

    def _kept(self, choice: Choice) -> Tensor:
        config, ids_nK = self.config, choice.expert_ids_nK
        if choice.kept_nK is not None:
            return choice.kept_nK
        if config.capacity_factor is None:
            return torch.ones_like(ids_nK, dtype=torch.bool)
        capacity = expert_capacity(config.capacity_factor, ids_nK.shape[0], ids_nK.shape[1], config.router_outputs)
        return within_capacity(ids_nK, capacity, choice.priority_n if config.batch_priority else None)

    def _generator(self, draw: int, device: torch.device) -> torch.Generator | None:
        """Draws of this forward pass; None where nothing is random."""
        random = self.training and (self.config.jitter or self.noise_weight is not None)
        if not random:
            return None
        digest = hashlib.blake2b(f"{self._seed}/{self.layer}/{draw}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)  # the seed is 63 bits


def _allowed(config: MoEConfig) -> Tensor:
    """[M, E]: may a token of the modality choose the expert; experts without computation serve all."""
    columns = [
        torch.tensor([m in group.modalities for m in MODALITY_ID])[:, None].expand(-1, group.num_experts)
        for group in config.groups
    ]
    free = torch.ones(len(MODALITY_ID), config.router_outputs - config.num_experts, dtype=torch.bool)
    return torch.cat([*columns, free], dim=1)
