"""What the benchmark of the training step is made of: the sizes, who takes part, where the time goes."""
