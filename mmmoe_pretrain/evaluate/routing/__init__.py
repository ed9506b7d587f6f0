"""The interpretable routing report of a trained run: ``mmmoe routing RUN``."""
