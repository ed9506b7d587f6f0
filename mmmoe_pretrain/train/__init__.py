"""The training loop and its log."""
