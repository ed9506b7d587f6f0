"""The K most probable experts of each token (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961)."""

from __future__ import annotations

from mmmoe_pretrain.moe.routing import Choice, RouterInputs, choose_top_k


def softmax_top_k(inputs: RouterInputs) -> Choice:
    """Weights are the probabilities, divided by their sum where ``renormalize`` and K > 1."""
    log_p_nE = inputs.logits_nE.log_softmax(-1)
    return choose_top_k(inputs, inputs.for_choice(log_p_nE.exp()), log_p_nE, log_p_nE)
