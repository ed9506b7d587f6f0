"""Parts of the benchmark of the training step: sizes, implementations, and the time by part."""
