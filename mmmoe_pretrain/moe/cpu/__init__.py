"""Code for CPUs only: experts computed one after another in blocks, and the utilities that make this fast."""
