"""One point of the grid, and the tensors that every implementation is given for it.

The routing is made first and the tokens after it: the router's rows are orthonormal, so a token can be shifted until
its logits choose exactly its experts, whatever the implementation and the type.

Shapes: T tokens, D hidden size, F expert hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EVEN, BALANCED, SKEWED = "even", "balanced", "skewed"
BUSIEST = 8.0  # times the mean load, of the skewed routing's busiest expert
BUSIEST_SHARE = 0.75  # of all tokens; what few experts allow instead
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Point:
    """Where a layer is timed."""

    tokens: int
    experts: int
    dtype: torch.dtype = torch.float32
    threads: int = 1
    routing: str = BALANCED
    top_k: int = 2
    hidden_size: int = 512
    expert_hidden_size: int = 1024

    @property
    def assignments(self) -> int:
        return self.tokens * self.top_k

    @property
    def name(self) -> str:
        """What ``--points`` selects by."""
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"T{self.tokens}-E{self.experts}-{kind}-{self.threads}t-{self.routing}"


@dataclass(frozen=True)
class Task:
    """The inputs and weights of a point. ``up_EFD``: [E, 2F, D], the gate before the up projection."""

    point: Point
    x_TD: Tensor
    grad_TD: Tensor
    router_ED: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    counts_E: list[int]


def expert_counts(point: Point) -> list[int]:
    """Assignments of each expert.

    even: equal, to within one. balanced: as many as chance gives it when every expert is as likely.
    skewed: falling as a power of the rank, such that the busiest has ``BUSIEST`` times the mean, or
    ``BUSIEST_SHARE`` of all tokens where that is less.
    """
    total, experts = point.assignments, point.experts
    if point.routing == EVEN:
        return [total // experts + (e < total % experts) for e in range(experts)]
    if point.routing == BALANCED:
        likely = torch.ones(point.tokens, experts)
        chosen = likely.multinomial(point.top_k, generator=torch.Generator().manual_seed(0))
        return chosen.reshape(-1).bincount(minlength=experts).tolist()
    assert point.routing == SKEWED, point.routing
    busiest = min(BUSIEST * total / experts, BUSIEST_SHARE * point.tokens) / total
    rank = torch.arange(1, experts + 1, dtype=torch.float64)
    low, high = 0.0, 16.0
    for _ in range(60):  # the first share grows with the power
        power = (low + high) / 2
        share = rank.pow(-power)
        share = share / share.sum()
        low, high = (power, high) if share[0] < busiest else (low, power)
    ends = (share.cumsum(0) * total).round().to(torch.int64).tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def assign(counts_E: list[int], tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """[T, K] experts, no token twice to one, with exactly these counts; which token is random."""
    assert sum(counts_E) == tokens * top_k and max(counts_E) <= tokens, (counts_E, tokens)
    experts = torch.randperm(len(counts_E), generator=generator)
    flat = experts.repeat_interleave(torch.tensor(counts_E)[experts])
    ids_KT = flat.view(top_k, tokens)  # a run is no longer than a row, so no column meets it twice
    spans = torch.stack([row.bincount(minlength=len(counts_E)) > 0 for row in ids_KT]).sum(0) > 1
    for row in ids_KT:  # mix the partners; an expert that stands in two rows stays, to meet no token twice
        movable = (~spans[row]).nonzero()[:, 0]
        row[movable] = row[movable[torch.randperm(movable.numel(), generator=generator)]]
    ids_TK = ids_KT.t()[torch.randperm(tokens, generator=generator)]
    order = torch.rand(tokens, top_k, generator=generator).argsort(-1)
    return ids_TK.gather(1, order)


def make_task(point: Point, device: torch.device, seed: int = 0) -> Task:
    """Tokens, weights and the gradient of the output; the same for the same point."""
    generator = torch.Generator().manual_seed(seed)
    counts = expert_counts(point)
    ids_TK = assign(counts, point.tokens, point.top_k, generator)
    router_ED = _orthonormal_rows(point.experts, point.hidden_size, generator).to(point.dtype)
    x_TD = _tokens_for(ids_TK, router_ED.float(), generator).to(point.dtype)
    grad_TD = torch.randn(x_TD.shape, generator=generator).to(point.dtype)
    made = torch.Generator(device).manual_seed(seed)
    sizes = (point.experts, 2 * point.expert_hidden_size, point.hidden_size)
    up = torch.empty(sizes, dtype=point.dtype, device=device).normal_(0, WEIGHT_STD, generator=made)
    sizes = (point.experts, point.hidden_size, point.expert_hidden_size)
    down = torch.empty(sizes, dtype=point.dtype, device=device).normal_(0, WEIGHT_STD, generator=made)
    task = Task(point, x_TD.to(device), grad_TD.to(device), router_ED.to(device), up, down, counts)
    chosen = (task.x_TD.float() @ task.router_ED.float().t()).topk(point.top_k).indices.cpu()
    assert torch.equal(chosen.sort(-1).values, ids_TK.sort(-1).values), "the tokens missed their experts"
    return task


def _orthonormal_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    assert rows <= columns, (rows, columns)
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].t().contiguous()


def _tokens_for(ids_TK: Tensor, router_ED: Tensor, generator: torch.Generator) -> Tensor:
    """Normal tokens with small logits, except for the chosen experts: 1.5 higher and 1 apart, more than the rounding
    of bf16."""
    tokens, top_k = ids_TK.shape
    experts, hidden_size = router_ED.shape
    x_TD = torch.randn(tokens, hidden_size, generator=generator)
    wanted = torch.randn(tokens, experts, generator=generator).clamp(-1, 1)
    height = 2.5 + torch.arange(top_k - 1, -1, -1.0) + 0.25 * torch.rand(tokens, top_k, generator=generator)
    wanted.scatter_(1, ids_TK, height)
    return x_TD + (wanted - x_TD @ router_ED.t()) @ router_ED
