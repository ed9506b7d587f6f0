"""What several benchmarks need: ranks that are forks, and DeepSpeed without its notes."""
