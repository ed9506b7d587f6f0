"""What the benchmark of the mixture layer is made of: the task, the implementations, the bounds."""
