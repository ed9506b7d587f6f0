"""What the benchmark of the dispatchers is made of: who takes part, the count of bytes, the ranks."""
