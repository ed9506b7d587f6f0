"""``mmmoe-data tokenizer``: a sentencepiece model from the train split of manifests.

Ids: pad 0, bos 1, eos 2, unk 3; bytes stand in for characters the vocabulary lacks, so any text
comes back whole (up to the normalisation). One thread and sorted texts make it deterministic.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.manifest import SPLITS, Row, read_manifest

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
MODEL_TYPES = ("bpe", "unigram")
SMALLEST = 4 + 256 + 1  # control pieces, byte pieces, the word mark
LONGEST_TEXT_BYTES = 1 << 16


def run(manifests: Sequence[Path], out: Path, vocab_size: int, model_type: str, split: str, casefold: bool) -> None:
    """The command: gather the texts of all manifests, train, and say what came out."""
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    texts = texts_of(itertools.chain.from_iterable(map(read_manifest, manifests)), split)
    train_tokenizer(texts, out, vocab_size, model_type, casefold)
    print(f"{out}: {vocab_size} pieces ({model_type}) from {len(texts)} texts of {split}")


def texts_of(rows: Iterable[Row], split: str) -> list[str]:
    """The distinct texts of a split, sorted; one line each."""
    return sorted({" ".join(row.text.split()) for row in rows if row.split == split and row.text})


def train_tokenizer(
    texts: Sequence[str], out: Path, vocab_size: int, model_type: str = "bpe", casefold: bool = True
) -> None:
    """Train on ``texts`` and write ``out``."""
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model-type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if vocab_size < SMALLEST:
        raise ValueError(f"--vocab-size {vocab_size} is below {SMALLEST}, which 4 control and 256 byte pieces need")
    if not texts:
        raise ValueError("no texts to train on; check --split and the manifests")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            hard_vocab_limit=True,
            normalization_rule_name="nmt_nfkc_cf" if casefold else "nmt_nfkc",
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=LONGEST_TEXT_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".tmp")
    partial.write_bytes(model.getvalue())
    partial.replace(out)


def _explain(message: str, vocab_size: int) -> str:
    too_high = re.search(r"too high \((\d+)\).*?<= (\d+)", message)
    if too_high:
        return f"--vocab-size {vocab_size} is more than these texts can fill; the largest that works is {too_high[2]}"
    too_low = re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message)
    if too_low:
        return f"--vocab-size {vocab_size} is too small for these texts' characters; use {too_low[2]} or more"
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {message.strip()}"
