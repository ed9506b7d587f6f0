"""Gates: from a token to one logit an expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmmoe_pretrain.moe.products import linear


def linear_gate(x_nD: Tensor, weight_ED: Tensor) -> Tensor:
    """x . w_e."""
    return linear(x_nD, weight_ED)


def laplace_gate(x_nD: Tensor, weight_ED: Tensor) -> Tensor:
    """-|x - w_e| (FuseMoE, arXiv 2402.03226): the nearest experts, bounded above by 0.

    Always by a matrix product: torch's default goes over to it at 26 rows, and a token's logits would then
    depend on how many others there are. A distance near 0 is off by up to 1e-3 |x|; its gradient is finite.
    """
    return -torch.cdist(x_nD, weight_ED, compute_mode="use_mm_for_euclid_dist")


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": linear_gate, "laplace": laplace_gate}
