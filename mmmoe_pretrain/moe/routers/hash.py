"""Experts by a fixed hash of the token: what routing is worth without learning (Roller et al. 2021,
arXiv 2106.04426). A control."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmmoe_pretrain.moe.plan import to_device
from mmmoe_pretrain.moe.routing import MASKED, Choice, RouterInputs

FIRST, STRIDE = 0x9E3779B1, 0x85EBCA6B  # odd 32-bit multipliers: two hashes that share nothing


def hash_route(inputs: RouterInputs) -> Choice:
    """The first choice is hash(key, modality) mod E; the others follow at a stride, hashed too, that
    shares no factor with E, so that all K are distinct. Weights are 1/K, with or without ``renormalize``.
    The same experts in every layer."""
    tokens, top_k, logits_nE = inputs.tokens, inputs.config.experts_per_token, inputs.logits_nE
    num_experts = logits_nE.shape[-1]
    coprime = [s for s in range(1, num_experts + 1) if math.gcd(s, num_experts) == 1]
    strides = to_device(coprime, torch.int64, logits_nE.device)
    key_n = tokens.keys_n * len(tokens.names.modalities) + tokens.modality_ids_n
    first_n = mixed(key_n, FIRST) % num_experts
    stride_n = strides[mixed(key_n, STRIDE) % len(coprime)]
    steps = torch.arange(top_k, device=logits_nE.device)
    ids_nK = (first_n[:, None] + stride_n[:, None] * steps) % num_experts
    nothing_nK = 0.0 * logits_nE.gather(-1, ids_nK)  # so that the router's weight has a gradient, of zeros
    log_p_nE = torch.full_like(logits_nE, MASKED).scatter(-1, ids_nK, -math.log(top_k))
    weights_nK = nothing_nK + 1.0 / top_k
    return Choice(ids_nK, weights_nK, log_p_nE, weights_nK[:, 0].detach())


def mixed(key_n: Tensor, multiplier: int) -> Tensor:
    """A 32-bit integer hash (multiply, and fold the high half onto the low, twice) of int64 [n]; fixed for
    ever, and the same on every device."""
    mask = 0xFFFFFFFF
    for _ in range(2):
        key_n = (key_n * multiplier) & mask
        key_n = key_n ^ (key_n >> 16)
    return key_n
