"""Parts of the benchmark of the MoE layer: the task, the implementations, the bounds."""
