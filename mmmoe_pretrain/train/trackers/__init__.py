"""Records of a run on their way to Weights & Biases, MLflow and trackio.

Each tracker's library runs in a process of its own (``relay.py``), which rank 0 sends the records to (``feed.py``)
without ever waiting: a library's threads, locks and exit handlers never meet the forks and the end of a rank.
"""
