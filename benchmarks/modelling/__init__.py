"""Parts of benchmarks/gpu_model.py."""
