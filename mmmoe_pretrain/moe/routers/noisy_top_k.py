"""Learned noise on the logits spreads the tokens (Shazeer et al. 2017, arXiv 1701.06538, section 2.1)."""

from __future__ import annotations

import dataclasses

from mmmoe_pretrain.moe.routers.softmax_top_k import softmax_top_k
from mmmoe_pretrain.moe.routing import Choice, RouterInputs


def noisy_top_k(inputs: RouterInputs) -> Choice:
    """softmax_top_k of logits + normal * std, which decide and weigh, so that the weights of the noise
    learn too; of the plain logits where there is no ``normal_nE`` (outside training)."""
    if inputs.normal_nE is None:
        return softmax_top_k(inputs)
    assert inputs.noise_std_nE is not None
    noisy_nE = inputs.logits_nE + inputs.normal_nE * inputs.noise_std_nE  # MASKED swallows any noise
    return softmax_top_k(dataclasses.replace(inputs, logits_nE=noisy_nE))
