"""Corpora, manifests, shards and tokenizers: everything before training (``mmmoe-data``).

Needs no GPU and no distributed runtime, and torch only where it trains a network (``codes``);
``docs/data_format.md`` says what it writes.
"""
