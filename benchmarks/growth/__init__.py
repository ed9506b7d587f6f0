"""What the benchmark of communication's growth is made of: the layouts, the count, the comparison."""
