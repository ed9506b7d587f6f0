"""MMMoE: pretraining of multimodal mixture-of-experts transformers."""

__version__ = "0.1.0"
