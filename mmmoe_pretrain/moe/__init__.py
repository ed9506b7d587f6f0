"""Sparse expert layers: routing, losses, dispatch, experts."""
