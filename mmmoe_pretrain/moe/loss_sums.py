"""Sums over a router's decisions for its losses and its telemetry. ``stats.gather_stats`` computes the sums that are
always kept; this module those that only a loss needs. Tokens are the valid ones (n of them): padding never reaches a
router. Shapes: M modalities, E experts (those without computation included), K choices, S segments.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.moe.routing import Choice, RouterInputs
from mmmoe_pretrain.moe.stats import RoutingStats, gather_stats

MIN_STD = 1e-4  # of learned noise: a softplus far below 0 is 0 in fp32, and the load divides by it


def statistics(
    inputs: RouterInputs, choice: Choice, kept_nK: Tensor, weight_ED: Tensor, allowed_ME: Tensor | None
) -> RoutingStats:
    """Sums over this rank's tokens, with gradients only if a loss needs them.

    ``inputs.logits_nE`` are masked by ``allowed_ME`` already; None is a router without masks.
    """
    losses, tokens, ids_nK = inputs.config.losses, inputs.tokens, choice.expert_ids_nK
    training = torch.is_grad_enabled()
    with torch.set_grad_enabled(training and losses.any_of_tokens):
        stats = gather_stats(inputs.logits_nE, choice.log_p_nE, ids_nK, kept_nK, tokens, choice.kept_nK)
        allowed_nE = None if allowed_ME is None else allowed_ME[tokens.modality_ids_n]
        if losses.load:
            load_nE = smooth_load(inputs, allowed_nE)
            member_Mn = F.one_hot(tokens.modality_ids_n, len(tokens.names.modalities)).to(load_nE.dtype).t()
            stats = dataclasses.replace(stats, load_ME=member_Mn @ load_nE)
        if losses.balance and losses.balance_scope == "sequence":
            p_nE = choice.log_p_nE.exp()
            total = sequence_balance(p_nE, ids_nK, choice.kept_nK, tokens.segment_ids_n, allowed_nE)
            stats = dataclasses.replace(stats, sequence_balance=total)
    if losses.orthogonality:
        stats = dataclasses.replace(stats, orthogonality=orthogonality(weight_ED))
    return dataclasses.replace(stats, allowed_ME=allowed_ME)


def smooth_load(inputs: RouterInputs, allowed_nE: Tensor | None) -> Tensor:
    """[n, E]: the probability that an expert is among the token's top k if the noise were drawn again.

    p_e(x) = 1 - Phi((eta_k - (W x)_e) / sigma), eta_k the k-th largest of the logits as they were seen (V-MoE, arXiv
    2106.05974, appendix A.2): on logits, not on probabilities, and eta_k has a gradient too. sigma is 1 / E, or what
    noisy_top_k has learned. Balancing biases and node groups are ignored: the load is that of the logits alone. 0
    where an expert may not be chosen.
    """
    logits_nE = inputs.logits_nE
    std: float | Tensor = 1 / logits_nE.shape[-1]
    seen_nE = logits_nE
    if inputs.noise_std_nE is not None:
        std = inputs.noise_std_nE.clamp(min=MIN_STD)
        if inputs.normal_nE is not None:
            seen_nE = logits_nE + inputs.noise_std_nE * inputs.normal_nE
    threshold_n1 = seen_nE.topk(inputs.config.experts_per_token, dim=-1).values[:, -1:]
    above_nE = logits_nE - threshold_n1
    if allowed_nE is None:
        return torch.special.ndtr(above_nE / std)
    above_nE = above_nE.masked_fill(~allowed_nE, 0.0)  # before dividing: -1e30 / std may overflow
    return torch.special.ndtr(above_nE / std).masked_fill(~allowed_nE, 0.0)


def sequence_balance(
    p_nE: Tensor, ids_nK: Tensor, chosen_nK: Tensor | None, segment_ids_n: Tensor, allowed_nE: Tensor | None
) -> Tensor:
    """[2]: the sum over segments of sum_e f_e P_e / q_e, and the number of segments.

    f_e is the expert's share of the segment's assignments, P_e the mean of its probabilities there,
    q_e its share if every token spread evenly over the experts that it may choose: 1/E without masks,
    which makes a segment's term the E/(K T) sum_e (assignments_e) P_e of DeepSeek-V3 (arXiv 2412.19437,
    eq. 17-20), 1 when even. Counted are the assignments made, so a balancing bias is part of them.
    """
    num_tokens, num_experts = p_nE.shape
    row_n, num_segments = _rank_of_segment(segment_ids_n)
    sums_SE = p_nE.new_zeros(num_tokens, num_experts)  # at most n segments: no synchronisation to learn S
    length_S = p_nE.new_zeros(num_tokens).index_add_(0, row_n, p_nE.new_ones(num_tokens)).clamp(min=1)
    mean_SE = sums_SE.index_add(0, row_n, p_nE) / length_S[:, None]
    chosen = p_nE.new_ones(ids_nK.shape) if chosen_nK is None else chosen_nK.to(p_nE.dtype)
    counts_nE = torch.zeros_like(p_nE).scatter_add_(1, ids_nK, chosen)
    counts_SE = sums_SE.index_add(0, row_n, counts_nE)
    share_SE = counts_SE / counts_SE.sum(1, keepdim=True).clamp(min=1)
    if allowed_nE is None:
        return torch.stack([num_experts * (share_SE * mean_SE).sum(), num_segments.to(p_nE.dtype)])
    allowed = allowed_nE.to(p_nE.dtype)
    even_SE = sums_SE.index_add(0, row_n, allowed / allowed.sum(1, keepdim=True)) / length_S[:, None]
    total = (share_SE * mean_SE / even_SE.clamp(min=torch.finfo(p_nE.dtype).tiny)).sum()
    return torch.stack([total, num_segments.to(p_nE.dtype)])


def _rank_of_segment(segment_ids_n: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the segments present a token belongs to, from 0, and how many there are: any ids, in
    any order, without reading their maximum from the device."""
    order_n = segment_ids_n.argsort(stable=True)
    sorted_n = segment_ids_n[order_n]
    first_n = torch.ones_like(sorted_n)
    first_n[1:] = (sorted_n[1:] != sorted_n[:-1]).to(first_n.dtype)
    row_n = torch.empty_like(sorted_n)
    row_n[order_n] = first_n.cumsum(0) - 1
    return row_n, first_n.sum()


def orthogonality(weight_ED: Tensor) -> Tensor:
    """|W W^T - I|_F^2 / E^2 with rows of length 1: experts should have orthogonal directions.

    Router orthogonalisation loss of the ERNIE 4.5 technical report (Baidu, 2025). There every modality
    has a router of its own and the step is taken outside of Adam; here it is one router of all experts
    (those of other modality groups too), and the gradient goes through the optimizer like any other.
    """
    unit_ED = F.normalize(weight_ED.float(), dim=-1)
    excess_EE = unit_ED @ unit_ED.t() - torch.eye(unit_ED.shape[0], device=unit_ED.device)
    return excess_EE.square().mean()
