"""Every expert is scored by itself, without competition (DeepSeek-V3, arXiv 2412.19437, section 2.1.2),
and where there are node groups a token's experts come from few of them."""

from __future__ import annotations

import torch.nn.functional as F

from mmmoe_pretrain.moe.routers.group_limited import within_best_groups
from mmmoe_pretrain.moe.routing import Choice, RouterInputs, choose_top_k


def sigmoid_top_k(inputs: RouterInputs) -> Choice:
    """Chosen by s + bias and weighed by s = sigmoid(logits), divided by the sum over the chosen where
    ``renormalize`` and K > 1. The routing distribution of losses and telemetry is s / sum s."""
    log_s_nE = F.logsigmoid(inputs.logits_nE)
    seen_nE = inputs.for_choice(log_s_nE.exp())
    if inputs.config.node_groups > 1:
        seen_nE = within_best_groups(seen_nE, inputs.config)
    return choose_top_k(inputs, seen_nE, log_s_nE, log_s_nE.log_softmax(-1))
