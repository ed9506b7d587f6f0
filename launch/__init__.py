"""Scripts that start runs: on one machine, under Slurm, on Kubernetes."""
