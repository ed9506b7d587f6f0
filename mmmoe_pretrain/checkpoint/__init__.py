"""Checkpoints by logical name and shape: they know neither engine nor layout."""

from mmmoe_pretrain.checkpoint.model import load_model

__all__ = ["load_model"]
