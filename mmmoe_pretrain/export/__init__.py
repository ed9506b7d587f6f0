"""Weights as safetensors with a model card, for programs that know nothing of this package; and back."""
