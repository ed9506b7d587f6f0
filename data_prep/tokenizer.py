"""``mmmoe-data tokenizer``: a sentencepiece model from the texts of a split of shards, manifests, tables or folders.

Ids: pad 0, bos 1, eos 2, unk 3. Characters outside of the vocabulary become byte pieces, so any text can be decoded
(up to the normalization). One thread, and distinct texts in the order of their hashes, make it deterministic: the
same texts in another order or container give the same model.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys
import tempfile
import unicodedata
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import xxhash

from mmmoe_pretrain.data_prep.console import answer, answering
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.data_prep.samples import NO_SPLIT, open_samples
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.urls import StorageError

log = logging.getLogger(__name__)
# sentencepiece's own rules, with case folded as NAME_cf; nfc is a table made here. nmt_nfkc alone turns
# the zero-width non-joiner (U+200C), which Persian and Indic scripts spell with, and direction marks into spaces.
NORMALIZATIONS = ("nfkc", "nfc", "identity", "nmt_nfkc")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
MODEL_TYPES = ("bpe", "unigram")
LEAST_COVERAGE = 0.98
SMALLEST = 4 + 256 + 1  # control pieces, byte pieces, the word mark
_MOST_NAMED = 5  # samples that are skipped
_AT_ONCE = 1 << 16  # texts between two removals of duplicates, at least
NO_FILTER: Mapping[str, Collection[str]] = MappingProxyType({})
PART = 1 << 14  # characters of a text that sentencepiece is given at once: it silently skips longer ones


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    vocab_size: int
    model_type: str = "bpe"
    casefold: bool | None = None  # None: unless the normalization is identity
    normalization: str = "nfkc"
    max_texts: int = 5_000_000
    character_coverage: float = 0.9995  # of all characters; the rarest ones are written in byte pieces

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"--normalization {self.normalization!r} is not one of {', '.join(NORMALIZATIONS)}")
        if self.casefold and self.normalization == "identity":
            raise ValueError(
                "--normalization identity changes nothing, so it folds no case; choose nfc, or --no-casefold"
            )
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"--model-type {self.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
        if not LEAST_COVERAGE <= self.character_coverage <= 1:
            raise ValueError(
                f"--character-coverage {self.character_coverage:g}: sentencepiece takes {LEAST_COVERAGE} to 1"
            )
        if self.vocab_size < SMALLEST:
            raise ValueError(
                f"--vocab-size {self.vocab_size} is below {SMALLEST}, which 4 control and 256 byte pieces need"
            )

    @property
    def folds(self) -> bool:
        return self.normalization != "identity" if self.casefold is None else self.casefold


def run(
    paths: Sequence[str],
    out: Path,
    split: str,
    options: TokenizerOptions,
    overwrite: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """The command: read the texts of all paths, train, and print a summary."""
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out is the file to write")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    with tempfile.TemporaryFile() as file:
        texts = Texts(file, options.max_texts)
        skipped = read_texts(paths, split, texts)
        count = texts.close()
        if not count:
            raise ValueError(f"no texts to train on in split {split}; check --split and the paths")
        if not dry_run:
            with Progress(f"training on {counted(count, 'text')}"):
                answering(lambda: train_tokenizer(texts, out, options))
    facts = {
        "out": str(out), "pieces": options.vocab_size, "model_type": options.model_type, "split": split,
        "texts": count, "drawn": texts.drawn, "skipped_samples": skipped, "written": not dry_run,
    }  # fmt: skip
    drawn = f" (drawn of more than {options.max_texts:,} by --max-texts)" if texts.drawn else ""
    pieces = f"{'would train ' * dry_run}{options.vocab_size} pieces ({options.model_type})"
    lines = [f"{out}: {pieces} from {counted(count, 'text')} of {split}{drawn}"]
    if skipped:
        lines.append(f"skipped {counted(skipped, 'sample')} that cannot be used; `mmmoe-data inspect` counts them")
    answer(as_json, facts, *lines)


def read_texts(
    paths: Sequence[str], split: str, texts: Texts, wanted: Mapping[str, Collection[str]] = NO_FILTER
) -> int:
    """Add the texts of a split, of samples that have one of the ``wanted`` values of each field; how many samples and
    rows cannot be used, of which the first are named in the log."""
    skipped = 0
    for sample in itertools.chain.from_iterable(map(open_samples, paths)):
        problem = sample.problem
        of_split = sample.split == split or (sample.split == NO_SPLIT and split == "train")
        if not problem and of_split and all(str(sample.fields.get(k) or "") in wanted[k] for k in wanted):
            try:
                for text in sample.texts():
                    texts.add(text)
            except StorageError:
                raise
            except ValueError as error:
                problem = str(error)
        if problem:
            skipped += 1
            if skipped <= _MOST_NAMED:
                log.warning("skipped %s %s: %s", sample.where, sample.key, problem)
    return skipped


class Texts:
    """The distinct texts of a corpus, in ``file``, in the order of their hashes; at most ``most``, those with the
    smallest hashes. 16 bytes of memory a text."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._most, self._limit, self.drawn = most, 2**64, False
        self._file, self._end = file, 0
        self._hashes, self._offsets = array("Q"), array("Q")

    def add(self, text: str) -> None:
        """One line of it."""
        text = re.sub(r"\s+", " ", text, flags=re.ASCII).strip()
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if digest >= self._limit:
            return
        line = json.dumps(text, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._hashes.append(digest)
        self._offsets.append(self._end)
        self._end += len(line)
        if len(self._hashes) >= 2 * self._most + _AT_ONCE:
            self._shrink()

    def close(self) -> int:
        """No more texts come; how many there are."""
        self._shrink()
        return len(self._hashes)

    def __iter__(self) -> Iterator[str]:
        for offset in self._offsets:
            self._file.seek(offset)
            yield json.loads(self._file.readline())

    def _shrink(self) -> None:
        """Keep each text once, and the ``most`` smallest hashes."""
        hashes, first = np.unique(np.frombuffer(self._hashes, np.uint64), return_index=True)
        if len(hashes) > self._most:
            self.drawn, self._limit = True, int(hashes[self._most])
        offsets = np.frombuffer(self._offsets, np.uint64)[first]
        self._hashes, self._offsets = array("Q"), array("Q")
        self._hashes.frombytes(hashes[: self._most].tobytes())
        self._offsets.frombytes(offsets[: self._most].tobytes())


def train_tokenizer(texts: Iterable[str], out: Path, options: TokenizerOptions) -> None:
    """Train on ``texts`` and write ``out``."""
    import sentencepiece

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text[at : at + PART] for text in texts for at in range(0, len(text), PART)),
                model_writer=model,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                byte_fallback=True,
                character_coverage=options.character_coverage,
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
                **_rule(options.normalization, options.folds, Path(folder)),
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), options.vocab_size)) from None
    with new_file(out) as draft:
        draft.write_bytes(_without_paths(model.getvalue()))


def _without_paths(model: bytes) -> bytes:
    """The model without the name of the temporary file that its normalization was read from."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model)
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return bytes(proto.SerializeToString(deterministic=True))


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
        return (
            f"--vocab-size {vocab_size} is too small for these texts' characters; use {too_low[2]} or more, or write "
            f"more of the rare ones in bytes with a lower --character-coverage"
        )
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {message.strip()}"
