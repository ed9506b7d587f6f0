"""Corpora, manifests, shards and tokenizers: everything before training (``mmmoe-data``).

Needs no GPU, no torch and no distributed runtime; ``docs/data_format.md`` says what it writes.
"""
