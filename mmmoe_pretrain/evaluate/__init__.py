"""Held-out scores and routing statistics of a trained run."""
