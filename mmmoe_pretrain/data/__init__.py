"""From shards to packed microbatches, one stage a file: shards, order, decode, pack, loader.

``evaluation.py`` walks held-out shards once, in order.
"""
