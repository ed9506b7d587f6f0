"""``mmmoe-data tokenizer``: a sentencepiece model from the train split of manifests.

Ids: pad 0, bos 1, eos 2, unk 3. Characters outside of the vocabulary become byte pieces, so any text can be decoded
(up to the normalization). One thread and sorted texts make it deterministic.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.manifest import SPLITS, Row, read_manifest
from mmmoe_pretrain.limits import has_text
from mmmoe_pretrain.progress import Progress, counted

# sentencepiece's own rules, with case folded as NAME_cf; nfc is a table made here. nmt_nfkc alone turns
# the zero-width non-joiner (U+200C), which Persian and Indic scripts spell with, and direction marks into spaces.
NORMALIZATIONS = ("nfkc", "nfc", "identity", "nmt_nfkc")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
MODEL_TYPES = ("bpe", "unigram")
SMALLEST = 4 + 256 + 1  # control pieces, byte pieces, the word mark
PART = 1 << 14  # characters of a text that sentencepiece is given at once: it silently skips longer ones


def run(
    manifests: Sequence[Path],
    out: Path,
    vocab_size: int,
    model_type: str,
    split: str,
    casefold: bool | None,
    normalization: str,
) -> None:
    """The command: read the texts of all manifests, train, and print a summary."""
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    texts = texts_of(itertools.chain.from_iterable(map(read_manifest, manifests)), split)
    with Progress(f"training on {counted(len(texts), 'text')}"):
        train_tokenizer(texts, out, vocab_size, model_type, casefold, normalization)
    print(f"{out}: {vocab_size} pieces ({model_type}) from {counted(len(texts), 'text')} of {split}")


def texts_of(rows: Iterable[Row], split: str) -> list[str]:
    """The distinct texts of a split, sorted; one line each."""
    kept = (text for row in rows if row.split == split for text in row.texts if has_text(text))
    return sorted({re.sub(r"\s+", " ", text, flags=re.ASCII).strip() for text in kept})


def train_tokenizer(
    texts: Sequence[str],
    out: Path,
    vocab_size: int,
    model_type: str = "bpe",
    casefold: bool | None = None,
    normalization: str = "nfkc",
) -> None:
    """Train on ``texts`` and write ``out``; case is folded by default, except without normalization."""
    import sentencepiece

    if normalization not in NORMALIZATIONS:
        raise ValueError(f"--normalization {normalization!r} is not one of {', '.join(NORMALIZATIONS)}")
    if casefold and normalization == "identity":
        raise ValueError(
            "--normalization identity changes nothing, so it folds no case; choose nfc, or --no-casefold"
        )
    folds = normalization != "identity" if casefold is None else casefold
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model-type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if vocab_size < SMALLEST:
        raise ValueError(f"--vocab-size {vocab_size} is below {SMALLEST}, which 4 control and 256 byte pieces need")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out is the file to write")
    if not texts:
        raise ValueError("no texts to train on; check --split and the manifests")
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text[at : at + PART] for text in texts for at in range(0, len(text), PART)),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                byte_fallback=True,
                character_coverage=0.9995,
                split_digits=True,
                hard_vocab_limit=True,
                pad_id=PAD_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                input_sentence_size=0,
                shuffle_input_sentence=False,
                max_sentence_length=4 * PART,  # bytes
                num_threads=1,
                minloglevel=2,
                **_rule(normalization, folds, Path(folder)),
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), vocab_size)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".tmp")
    partial.write_bytes(model.getvalue())
    partial.replace(out)


def nfc_rules(folds: bool) -> Iterator[str]:
    """Lines of sentencepiece's rule table: each canonically equivalent spelling of a letter -> the composed letter.

    Letters take at most three marks (Unicode 16); marks beyond those of one letter stay as they are.
    """
    for letter in filter(_changes, map(chr, itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1)))):
        composed = unicodedata.normalize("NFC", letter)
        target = unicodedata.normalize("NFC", _fold(composed)) if folds else composed
        for spelling in sorted(_spellings(letter) - {target}):
            yield f"{_codes(spelling)}\t{_codes(target)}\n"


def _rule(normalization: str, folds: bool, folder: Path) -> dict[str, Any]:
    """The options of sentencepiece that choose the normalization."""
    if normalization != "nfc":
        return {"normalization_rule_name": normalization + ("_cf" if folds else "")}
    table = folder / "nfc.tsv"
    table.write_text("".join(nfc_rules(folds)), encoding="ascii")
    return {"normalization_rule_tsv": str(table)}


def _changes(letter: str) -> bool:
    return not unicodedata.is_normalized("NFD", letter) or letter.casefold() != letter


def _spellings(letter: str) -> set[str]:
    """The strings that are canonically equivalent to ``letter``: marks composed or apart, in any order."""
    base, *marks = tuple(unicodedata.normalize("NFD", letter))
    orders = set(itertools.permutations(marks))
    found = {
        unicodedata.normalize("NFC", base + "".join(order[:some])) + "".join(order[some:])
        for order in orders
        for some in range(len(marks) + 1)
    }
    found |= {letter, base + "".join(marks)}
    composed = unicodedata.normalize("NFC", letter)
    return {spelling for spelling in found if unicodedata.normalize("NFC", spelling) == composed}


def _fold(text: str) -> str:
    """Unicode's simple case folding, as sentencepiece has it: one letter stays one letter."""
    return "".join(next((one for one in (c.casefold(), c.lower()) if len(one) == 1), c) for c in text)


def _codes(text: str) -> str:
    return " ".join(f"{ord(letter):X}" for letter in text)


def _explain(message: str, vocab_size: int) -> str:
    too_high = re.search(r"too high \((\d+)\).*?<= (\d+)", message)
    if too_high:
        return f"--vocab-size {vocab_size} is too large for these texts; the largest that works is {too_high[2]}"
    too_low = re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message)
    if too_low:
        return f"--vocab-size {vocab_size} is too small for these texts' characters; use {too_low[2]} or more"
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {message.strip()}"
