"""Weights as safetensors with a model card, for programs without this package; and the import of such files."""
