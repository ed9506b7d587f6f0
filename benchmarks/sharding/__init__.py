"""What benchmarks/shard.py runs and measures."""
