"""Every expert takes its C best tokens: full experts without a balance loss (arXiv 2202.09368).

Where a token goes depends on all tokens of the microbatch, later ones included, so the config refuses
it where segments are causal.
"""

from __future__ import annotations

import math

import torch

from mmmoe_pretrain.moe.routing import Choice, RouterInputs, expert_capacity


def expert_choice(inputs: RouterInputs) -> Choice:
    """C = ceil(c n K / E), c = ``capacity_factor`` or 1: K experts a token in the mean, and from none to
    all of them for one. ``expert_ids_nK`` names all E experts for every token, ``kept_nK`` says which
    of them took it. Weights are the probabilities, also with ``renormalize``: a token's number of
    experts would change their meaning. An expert takes no token that may not choose it, and then fewer
    than C; tokens whose probabilities are NaN are taken last. Experts without computation take tokens
    as the others do.
    """
    config, logits_nE = inputs.config, inputs.logits_nE
    num_tokens, num_experts = logits_nE.shape
    log_p_nE = logits_nE.log_softmax(-1)
    p_nE = log_p_nE.exp()
    capacity = expert_capacity(config.capacity_factor or 1.0, num_tokens, config.experts_per_token, num_experts)
    scores_nE = inputs.for_choice(p_nE).nan_to_num(nan=-1.0, neginf=-math.inf)
    taken_CE = scores_nE.topk(min(capacity, num_tokens), dim=0).indices
    kept_nE = torch.zeros_like(logits_nE, dtype=torch.bool).scatter(0, taken_CE, True) & ~inputs.masked_nE
    ids_nE = torch.arange(num_experts, device=logits_nE.device).expand(num_tokens, -1)
    return Choice(ids_nE, p_nE * kept_nE, log_p_nE, p_nE.detach().amax(-1), kept_nE)
