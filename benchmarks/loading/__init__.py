"""The loaders that benchmarks/loader.py compares, and the shards that they read."""
