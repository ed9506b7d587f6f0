"""Processes that decode ahead of training, and the one rank of a model replica that loads for all of it."""
