"""The K most probable experts of each token (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961)."""

from __future__ import annotations

from mmmoe_pretrain.moe.routing import Choice, RouterInputs, chosen_weights


def softmax_top_k(inputs: RouterInputs) -> Choice:
    """Weights are the probabilities, divided by their sum where ``renormalize`` and K > 1."""
    log_p_nE = inputs.logits_nE.log_softmax(-1)
    ids_nK = inputs.for_choice(log_p_nE.exp()).topk(inputs.config.experts_per_token, dim=-1).indices
    chosen_nK = log_p_nE.gather(-1, ids_nK)
    return Choice(ids_nK, chosen_weights(chosen_nK, inputs.config), log_p_nE, log_p_nE.detach().amax(-1).exp())
