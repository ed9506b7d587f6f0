"""Scripts that start runs on one machine, and the comparison with the dense baseline."""
