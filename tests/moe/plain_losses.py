"""The auxiliary losses token by token in fp64: an independent reference for softmax top-k routers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from tests.moe.plain_experts import reachable
from tests.moe.routing_inputs import NAMES


class PlainRouting:
    """Routes token after token; ``terms`` are the unweighted losses over any set of tokens."""

    def __init__(self, config: MoEConfig, weight_ED: Tensor, x_nD: Tensor, modalities: list[int]) -> None:
        self.weight, self.experts, self.modalities = weight_ED, config.num_experts, modalities
        self.p, self.load, self.chosen, self.even, self.z = [], [], [], [], []
        for x, m in zip(x_nD, modalities, strict=True):
            allowed = reachable(config, NAMES.modalities[m])
            logits = weight_ED[allowed] @ x
            p = (logits - logits.logsumexp(0)).exp()
            eta = logits.sort(descending=True).values[config.experts_per_token - 1]
            load = [0.5 * (1 + torch.erf((logit - eta) * self.experts / math.sqrt(2))) for logit in logits]
            top = logits.argsort(descending=True)[: config.experts_per_token].tolist()
            self.p.append(self._spread(p, allowed))
            self.load.append(self._spread(torch.stack(load), allowed))
            self.chosen.append([allowed[i] for i in top])
            self.even.append(
                self._spread(torch.full((len(allowed),), 1 / len(allowed), dtype=torch.float64), allowed)
            )
            self.z.append(logits.logsumexp(0) ** 2)

    def _spread(self, values: Tensor, allowed: list[int]) -> list[Tensor]:
        row = [torch.zeros((), dtype=torch.float64)] * self.experts
        for value, e in zip(values.double(), allowed, strict=True):
            row[e] = value
        return row

    def tokens_of(self, modality: int) -> list[int]:
        return [t for t, m in enumerate(self.modalities) if m == modality]

    def mean(self, rows: list[list[Tensor]], tokens: list[int], e: int) -> Tensor:
        return sum((rows[t][e] for t in tokens), start=torch.zeros((), dtype=torch.float64)) / len(tokens)

    def unevenness(self, rows: list[list[Tensor]], tokens: list[int]) -> Tensor:
        """Against each token's own sum, spread evenly over the experts that it may choose."""
        total = sum(sum(rows[t]) for t in tokens)
        value = torch.zeros((), dtype=torch.float64)
        for e in range(self.experts):
            share = sum(rows[t][e] for t in tokens) / total
            even = sum(sum(rows[t]) * self.even[t][e] for t in tokens) / total
            if even > 0:
                value = value + (share - even) ** 2 / even
        return value

    def balance(self, tokens: list[int]) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        assignments = [e for t in tokens for e in self.chosen[t]]
        for e in range(self.experts):
            even = self.mean(self.even, tokens, e)
            if even > 0:
                value = value + assignments.count(e) / len(assignments) * self.mean(self.p, tokens, e) / even
        return value

    def z_loss(self, tokens: list[int]) -> Tensor:
        return sum(self.z[t] for t in tokens) / len(tokens)

    def local_entropy(self, tokens: list[int]) -> Tensor:
        return sum(entropy(self.p[t]) for t in tokens) / len(tokens)

    def global_entropy(self, tokens: list[int]) -> Tensor:
        return -entropy([self.mean(self.p, tokens, e) for e in range(self.experts)])

    def orthogonality(self) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for i, a in enumerate(self.weight):
            for j, b in enumerate(self.weight):
                value = value + (a @ b / (a.norm() * b.norm()) - float(i == j)) ** 2
        return value / self.experts**2


def entropy(p: list[Tensor]) -> Tensor:
    """Nats."""
    return -sum(value * value.log() for value in p if value > 0)
