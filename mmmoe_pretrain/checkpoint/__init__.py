"""Checkpoints by logical name and shape, independent of engine and layout."""

from mmmoe_pretrain.checkpoint.model import load_model, trained_module

__all__ = ["load_model", "trained_module"]
