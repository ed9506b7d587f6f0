"""Captioning: the next token of a text behind an image or audio prefix.

Its loss is the mean negative log-likelihood of all targets of an optimizer step: the sum that
``ModelOutput.caption_nll`` holds of a microbatch, over the targets of the step (``counts.py``).
"""

from __future__ import annotations

from mmmoe_pretrain.batch import IGNORE, Batch


def num_targets(batch: Batch) -> int:
    """Tokens of captions to be predicted."""
    return int((batch.targets[: batch.num_valid] != IGNORE).sum())
