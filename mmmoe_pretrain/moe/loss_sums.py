"""Sums over a router's decisions for its losses and its telemetry; some are needed by one loss alone.

Tokens are the valid ones (n of them): padding never reaches a router. Shapes: M modalities, X tasks, E experts (those
without computation included), K choices, S segments, C combinations of modalities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.moe.routing import Choice, RouterInputs
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo

MIN_STD = 1e-4  # of learned noise: a softplus far below 0 is 0 in fp32, and the load divides by it


def gather_stats(
    inputs: RouterInputs, choice: Choice, kept_nK: Tensor, allowed_ME: Tensor, weight_ED: Tensor, layer: int = 0
) -> RoutingStats:
    """Sums over this rank's tokens, with gradients only if a loss needs them. ``inputs.logits_nE`` are masked by
    ``allowed_ME`` already."""
    losses, tokens, ids_nK, logits_nE = inputs.config.losses, inputs.tokens, choice.expert_ids_nK, inputs.logits_nE
    E, M, X = logits_nE.shape[-1], len(tokens.names.modalities), len(tokens.names.tasks)
    chosen_nK = torch.ones_like(kept_nK) if choice.kept_nK is None else choice.kept_nK
    cell_n = tokens.modality_ids_n * X + tokens.task_ids_n
    member_Cn = F.one_hot(cell_n, M * X).to(logits_nE.dtype).t()
    counts_nE = torch.zeros_like(logits_nE).scatter_add_(1, ids_nK, chosen_nK.to(logits_nE.dtype))
    of_weight = orthogonality(weight_ED) if losses.orthogonality else logits_nE.new_zeros(())
    with torch.set_grad_enabled(torch.is_grad_enabled() and losses.any_of_tokens):
        log_p_nE = choice.log_p_nE
        p_nE = log_p_nE.exp()
        load_ME, of_segments = p_nE.new_zeros(M, E), p_nE.new_zeros(2)
        if losses.load:
            load_nE = smooth_load(inputs, allowed_ME[tokens.modality_ids_n])
            load_ME = (member_Cn @ load_nE).view(M, X, E).sum(1)
        if losses.balance and losses.balance_scope == "sequence":
            of_segments = sequence_balance(p_nE, counts_nE, tokens.segment_ids_n, allowed_ME[tokens.modality_ids_n])
        return RoutingStats(
            probability_MXE=(member_Cn @ p_nE).view(M, X, E),
            entropy_MX=-(member_Cn @ (p_nE * log_p_nE).sum(-1)).view(M, X),
            z_MX=(member_Cn @ logits_nE.logsumexp(-1).square()).view(M, X),
            counts_MXE=(member_Cn @ counts_nE).view(M, X, E),
            tokens_MX=member_Cn.sum(1).view(M, X),
            dropped_MX=(member_Cn @ (chosen_nK & ~kept_nK).sum(-1).to(p_nE.dtype)).view(M, X),
            load_ME=load_ME,
            sequence_balance=of_segments,
            combination_C3=combination_sums(log_p_nE, ids_nK, tokens),
            coactivation_MEE=coactivation(ids_nK, kept_nK, tokens.modality_ids_n, M, E),
            orthogonality=of_weight,
            names=tokens.names,
            allowed_ME=allowed_ME,
            layer=layer,
        )


def combination_sums(log_p_nE: Tensor, ids_nK: Tensor, tokens: TokenInfo) -> Tensor:
    """[C, 3], see ``RoutingStats``. The expert of combination c is number c."""
    combination_n, count = tokens.combination_ids_n, len(tokens.names.combinations)
    if combination_n is None or not count:
        return log_p_nE.new_zeros(count, 3)
    expert_n1 = combination_n.clamp(min=0)[:, None]
    member_Cn = F.one_hot(combination_n + 1, count + 1)[:, 1:].to(log_p_nE.dtype).t()
    is_first_n1 = (ids_nK[:, :1] == expert_n1).to(log_p_nE.dtype)
    columns = (-log_p_nE.gather(1, expert_n1), torch.ones_like(is_first_n1), is_first_n1)
    return member_Cn @ torch.cat(columns, dim=1)


def coactivation(ids_nK: Tensor, kept_nK: Tensor, modality_ids_n: Tensor, M: int, E: int) -> Tensor:
    """[M, E, E]: tokens that both experts served; 0 on the diagonal."""
    top_k = ids_nK.shape[-1]
    if top_k * (top_k - 1) > 2 * E:  # expert choice has E entries a token: too many pairs to list
        served_nE = torch.zeros(ids_nK.shape[0], E, device=ids_nK.device).scatter_(1, ids_nK, kept_nK.float())
        of_modality = [served_nE * (modality_ids_n == m)[:, None] for m in range(M)]
        together_MEE = torch.stack([rows_nE.t() @ rows_nE for rows_nE in of_modality])
        return together_MEE * (1 - torch.eye(E, device=ids_nK.device))
    first, second = torch.triu_indices(top_k, top_k, 1, device=ids_nK.device)
    cells = (modality_ids_n[:, None] * E + ids_nK[:, first]) * E + ids_nK[:, second]
    both = (kept_nK[:, first] & kept_nK[:, second]).float()
    pairs = both.new_zeros(M * E * E).scatter_add_(0, cells.reshape(-1), both.reshape(-1))
    return pairs.view(M, E, E) + pairs.view(M, E, E).transpose(1, 2)


def smooth_load(inputs: RouterInputs, allowed_nE: Tensor) -> Tensor:
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
    above_nE = (logits_nE - threshold_n1).masked_fill(~allowed_nE, 0.0)  # before dividing: -1e30 / std may overflow
    return torch.special.ndtr(above_nE / std).masked_fill(~allowed_nE, 0.0)


def sequence_balance(p_nE: Tensor, counts_nE: Tensor, segment_ids_n: Tensor, allowed_nE: Tensor) -> Tensor:
    """[2]: the sum over segments of sum_e f_e P_e / q_e, and the number of segments.

    f_e is the expert's share of the segment's assignments ``counts_nE``, P_e the mean of its probabilities there,
    q_e its share if every token spread evenly over the experts that it may choose: 1/E where that is all,
    which makes a segment's term the E/(K T) sum_e (assignments_e) P_e of DeepSeek-V3 (arXiv 2412.19437,
    eq. 17-20), 1 when even. Counted are the assignments made, so a balancing bias is part of them.
    """
    row_n, num_segments = _rank_of_segment(segment_ids_n)

    def by_segment(values_nE: Tensor) -> Tensor:  # at most n segments: no synchronisation to learn S
        return torch.zeros_like(values_nE).index_add(0, row_n, values_nE)

    length_S1 = by_segment(torch.ones_like(p_nE[:, :1])).clamp(min=1)
    counts_SE = by_segment(counts_nE)
    share_SE = counts_SE / counts_SE.sum(1, keepdim=True).clamp(min=1)
    allowed = allowed_nE.to(p_nE.dtype)
    even_SE = by_segment(allowed / allowed.sum(1, keepdim=True)) / length_S1
    mean_SE = by_segment(p_nE) / length_S1
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
