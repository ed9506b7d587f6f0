"""From shards to packed microbatches.

- ``storage/`` reads the bytes of files: local, over HTTP, in buckets; retries, read-ahead and a cache on the node.
- ``sources/`` holds samples: indexed shards and streams, how shards are found, how tars are read.
- ``order/`` says which sample stands at each global position, and which data-parallel rank serves it.
- ``workers/`` are the processes that decode ahead of training, and the replica that one rank loads for.

``loader.py`` joins them: it decodes (``decode.py``) and packs (``pack.py``) what a rank trains on; ``cursor.py`` is
its state in a checkpoint, ``budget.py`` bounds a batch, and ``evaluation.py`` reads held-out samples once, in order.
"""
