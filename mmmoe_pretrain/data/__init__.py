"""From shards to packed microbatches, one stage a file: source, order, decode, pack, loader.

The loader reads ahead in processes: it iterates over ``workers.py``; ``dispatch.py`` assigns tasks, ``worker.py`` is
a process that does them, and ``arena.py`` the memory that they share. ``replica.py`` gives the batches of a rank to
the other ranks of its model. ``evaluation.py`` walks held-out shards once, in order.
"""
