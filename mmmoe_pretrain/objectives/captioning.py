"""Captioning: the next token of a text behind an image or audio prefix.

The mean runs over all target tokens of the global microbatch, whatever share of them each
data-parallel rank holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmoe_pretrain.parallel.collectives import all_reduce_sum, group_size
from mmmoe_pretrain.parallel.groups import Groups


def captioning_loss(caption_nll_N: Tensor, groups: Groups) -> Tensor:
    """Mean negative log-likelihood in nats; mean over the ranks is the loss."""
    count = torch.tensor(float(caption_nll_N.numel()), device=caption_nll_N.device)
    total = all_reduce_sum(count, groups.data).clamp(min=1)
    return group_size(groups.data) * caption_nll_N.sum() / total
