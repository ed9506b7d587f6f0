"""Parts of the benchmark of the levers."""
