"""The router of one layer: its parameters, and the steps of a routing decision.

input (task embedding, jitter) -> gate (logits) -> mask (expert groups) -> router function (choice)
-> capacity -> statistics. Everything in fp32 for any type of x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.balance import updated_bias
from mmmoe_pretrain.moe.cpu.matmul import linear
from mmmoe_pretrain.moe.loss_sums import gather_stats
from mmmoe_pretrain.moe.routing import MASKED, Choice, RouterInputs, Routing, expert_capacity, within_capacity
from mmmoe_pretrain.moe.routing_memory import RoutingMemory
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo

DORMANT = 32.0  # exp(-32) = 1.3e-14, below the resolution of fp32 beside a probability


class Router(nn.Module):
    """``weight``: [E, D]. ``task_embedding``: [1, D] by task, of those that are routed by their task, too: added to
    the token, as a task is in Task-MoE, or in its place, so that one choice serves the whole task (arXiv 2110.03742).
    ``noise_weight``: [E, D], of noisy_top_k. ``logit_bias``: [E], if ``router_bias``. ``bias``: buffers [1, E] of
    bias balancing, ``all`` or by modality. E counts the experts without computation too. ``dormancy``: buffer [E], by
    which logits are lowered: ``DORMANT`` for an expert just added to a trained model, falling to 0 over
    ``wake_steps`` optimizer steps; 0 for all others.

    ``begin_step(seed)`` before each optimizer step makes jitter and noise a function of that seed, the
    layer, and ``TokenInfo.draw``.
    """

    dormancy: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, names: StreamNames) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.cpu_config = CpuConfig()  # models/trunk.set_cpu
        experts = config.router_outputs
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.task_embedding: nn.ParameterDict | None = None
        if tasks := config.conditioned(names.tasks):
            rows = {task: nn.Parameter(torch.zeros(1, hidden_size)) for task in tasks}
            self.task_embedding = nn.ParameterDict(rows)
            alone = [config.task_input == "alone" and task in tasks for task in names.tasks]
            self.register_buffer("by_task_alone_X", torch.tensor(alone), persistent=False)
        noisy = config.router == "noisy_top_k"
        self.noise_weight = nn.Parameter(torch.zeros(experts, hidden_size)) if noisy else None
        self.logit_bias = nn.Parameter(torch.zeros(experts)) if config.router_bias else None
        size = config.routing_memory_size
        self.memory = RoutingMemory(hidden_size, size, experts) if size else None
        self.bias: nn.Module | None = None
        if config.bias_balancing.on:
            self.bias = nn.Module()
            for name in names.modalities if config.bias_balancing.per_modality else ("all",):
                self.bias.register_buffer(name, torch.zeros(1, experts))
        if config.wake_steps:
            self.register_buffer("dormancy", torch.zeros(experts))
        self.register_buffer("allowed_ME", _allowed(config, names.modalities), persistent=False)
        self._route: Callable[[RouterInputs], Choice] = kinds.ROUTERS.load(config.router)
        self._seed = layer

    def begin_step(self, seed: int) -> None:
        self._seed = seed

    @torch.no_grad()
    def end_step(self, stats: RoutingStats) -> None:
        """After an optimizer step whose routing over all ranks and microbatches was ``stats``."""
        if self.config.bias_balancing.rate:
            allowed_ME = self.get_buffer("allowed_ME")
            if self.config.wake_steps:  # dormant experts are excluded: without load their bias would only rise
                allowed_ME = allowed_ME & (self.dormancy <= 0)
            assert self.bias is not None
            before = torch.cat(list(self.bias.buffers()))
            bias = updated_bias(before, stats, self.config.bias_balancing.rate, allowed_ME)
            if self.config.wake_steps:
                bias = torch.where(self.dormancy > 0, before, bias)
            for buffer, row_E in zip(self.bias.buffers(), bias, strict=True):
                buffer.copy_(row_E[None])
        if self.config.wake_steps:
            self.dormancy.sub_(DORMANT / self.config.wake_steps).clamp_(min=0)

    def forward(self, x_nD: Tensor, tokens: TokenInfo, memory_nR: Tensor | None = None) -> Routing:
        """[n, D] -> the experts of each token, their weights, and the sums of this rank's routing. ``memory_nR``: of
        the router before, where ``routing_memory_size`` says that there is one."""
        config = self.config
        generator = self._generator(tokens.draw, x_nD.device)
        seen_nD = self._input(x_nD, tokens, generator)
        logits_nE = GATES[config.gate](seen_nD, self.weight.float(), self.cpu_config.products)
        if self.logit_bias is not None:
            logits_nE = logits_nE + self.logit_bias.float()
        if self.memory is not None:
            remembered_nE, memory_nR = self.memory(seen_nD, memory_nR)
            logits_nE = logits_nE + remembered_nE
        if config.wake_steps:
            logits_nE = logits_nE - self.dormancy
        inputs = self._inputs(seen_nD, logits_nE, tokens, generator)
        choice = self._route(inputs)
        ids_nK, kept_nK = choice.expert_ids_nK, self._kept(choice)
        stats = gather_stats(inputs, choice, kept_nK, self.get_buffer("allowed_ME"), self.weight, self.layer)
        weights_nK = choice.weights_nK * (kept_nK * config.routed_scaling_factor)
        return Routing(ids_nK, weights_nK, kept_nK, stats, choice.log_p_nE, memory_nR)

    def _input(self, x_nD: Tensor, tokens: TokenInfo, generator: torch.Generator | None) -> Tensor:
        seen_nD = x_nD.float()
        if self.task_embedding is not None:
            nothing = seen_nD.new_zeros(1, seen_nD.shape[1])
            rows = [self.task_embedding.get(task, nothing) for task in tokens.names.tasks]
            of_task_nD = torch.cat(rows).float()[tokens.task_ids_n]
            if self.config.task_input == "alone":
                alone_n = self.get_buffer("by_task_alone_X")[tokens.task_ids_n]
                seen_nD = seen_nD.masked_fill(alone_n[:, None], 0.0)
            seen_nD = seen_nD + of_task_nD
        if self.config.jitter and generator is not None:
            noise = torch.rand(seen_nD.shape, generator=generator, device=seen_nD.device)
            seen_nD = seen_nD * (1 + self.config.jitter * (2 * noise - 1))
        return seen_nD

    def _inputs(
        self, seen_nD: Tensor, logits_nE: Tensor, tokens: TokenInfo, generator: torch.Generator | None
    ) -> RouterInputs:
        bias_nE = None
        if self.bias is not None:
            rows = torch.cat(list(self.bias.buffers()))
            bias_nE = rows[tokens.modality_ids_n] if self.config.bias_balancing.per_modality else rows
            if self.config.wake_steps:  # no balancing bias makes a dormant expert chosen
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


def _allowed(config: MoEConfig, modalities: Sequence[str]) -> Tensor:
    """[M, E]: whether tokens of the modality may choose the expert; all may choose experts without computation."""
    columns = [
        torch.tensor([group.serves(m) for m in modalities])[:, None].expand(-1, group.num_experts)
        for group in config.groups
    ]
    free = torch.ones(len(modalities), config.router_outputs - config.num_experts, dtype=torch.bool)
    return torch.cat([*columns, free], dim=1)


def laplace_gate(x_nD: Tensor, weight_ED: Tensor, products: str = "auto") -> Tensor:
    """-|x - w_e| (FuseMoE, arXiv 2402.03226): the nearest experts, bounded above by 0.

    Always by a matrix product: torch's default switches to it at 26 rows, and a token's logits would then
    depend on how many others there are. A distance near 0 is off by up to 1e-3 |x|; its gradient is finite.
    torch chooses the library (``products`` is for other gates).
    """
    return -torch.cdist(x_nD, weight_ED, compute_mode="use_mm_for_euclid_dist")


GATES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {"linear": linear, "laplace": laplace_gate}
