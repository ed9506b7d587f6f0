"""How often each token occurs in the training captions, read from a bounded number of them.

Owns the sample: spread evenly over each training folder, each folder by its share of the mix.
"""

from __future__ import annotations

import numpy as np

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import caption
from mmmoe_pretrain.data.members import members_read
from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.modalities import Codecs
from mmmoe_pretrain.progress import track

MAX_TEXTS = 10_000


def count_train_tokens(config: RunConfig, codecs: Codecs, limit: int = MAX_TEXTS) -> tuple[np.ndarray, int]:
    """Token counts [V], end marks included, and the number of captions read."""
    counts_V = np.zeros(codecs.text.vocab_size, dtype=np.int64)
    captions = 0
    total_weight = sum(source.weight for source in config.data.train)
    for source in config.data.train:
        folder = ShardFolder(source.path)
        wanted = min(len(folder), max(1, round(limit * source.weight / total_weight)))
        places = np.linspace(0, len(folder) - 1, wanted).astype(int).tolist()
        for i in track(places, f"counting the words of {source.path}", wanted, "samples"):
            raw = folder.read(i)
            text = caption(raw)
            if text and members_read(tuple(raw.members)).keys() & {"image", "audio"}:
                ids = np.append(codecs.text.encode(text), codecs.text.eos_id)
                counts_V += np.bincount(ids, minlength=len(counts_V))
                captions += 1
    return counts_V, captions
