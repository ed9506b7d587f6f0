"""The trunk, its blocks, and the model that joins embedders and heads."""
