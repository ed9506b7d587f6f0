"""Vectors of words: the file that `mmmoe-data words` writes, its checks, its fingerprint, and the rule of words."""

from __future__ import annotations

import functools
import io
import unicodedata
import zipfile
from pathlib import Path
from tokenize import TokenError

import numpy as np
import xxhash

from mmmoe_pretrain.limits import DECODER_ERRORS, has_text
from mmmoe_pretrain.untrusted import brief, read_bytes

MAX_BYTES = 1 << 32
# What numpy and zipfile raise on damaged files. MemoryError: of a shape in a header; the file itself is limited.
_DAMAGE: tuple[type[Exception], ...] = (*DECODER_ERRORS, zipfile.BadZipFile, TokenError, MemoryError)


def words_of(text: str) -> list[str]:
    """The runs of letters and digits of ``text``, without case; with the marks on them, such as vowels of Hindi."""
    letters = unicodedata.normalize("NFKC", text).casefold()
    runs = "".join(letter if _of_word(letter) else " " for letter in letters).split()
    return [run for run in runs if any(map(str.isalnum, run))]


@functools.cache
def _of_word(letter: str) -> bool:
    """Variation selectors are marks, too, and say how an emoji is drawn."""
    return letter.isalnum() or (unicodedata.category(letter) in ("Mn", "Mc") and has_text(letter))


class WordVectors:
    """``numbers``: word -> row of ``vectors``, float32 [words, W]."""

    def __init__(self, path: str | Path, *, expected_fingerprint: str = "") -> None:
        data = _read(Path(path))
        self.fingerprint = xxhash.xxh3_128_hexdigest(data)
        if expected_fingerprint and self.fingerprint != expected_fingerprint:
            raise ValueError(
                f"the word vectors {path} have fingerprint {self.fingerprint}, but the run was made with "
                f"{expected_fingerprint}; name the file that the run started with"
            )
        self.words, self.vectors = _parse(data, path)
        self.numbers = {word: number for number, word in enumerate(self.words)}

    @property
    def size(self) -> int:
        """W, the numbers of a vector."""
        return int(self.vectors.shape[1])

    def mean(self, text: str) -> np.ndarray | None:
        """The mean of the vectors of the words of ``text``, with norm 1; None where it has no known word."""
        rows = [self.numbers[word] for word in words_of(text) if word in self.numbers]
        if not rows:
            return None
        mean = self.vectors[rows].mean(axis=0, dtype=np.float64)
        norm = np.linalg.norm(mean)
        return (mean / norm).astype(np.float32) if norm > 0 else None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no word vectors at {path}; make the file by mmmoe-data words")
    return read_bytes(path, MAX_BYTES)


def _parse(data: bytes, path: str | Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            words, vectors = np.asarray(file["words"]), np.asarray(file["vectors"])
    except _DAMAGE as error:
        why = f"{type(error).__name__}: {brief(str(error))}"
        raise ValueError(f"{path} is no file of word vectors ({why}); make one by mmmoe-data words") from None
    is_table = words.dtype.kind == "U" and vectors.dtype == np.float32 and words.ndim == 1 and vectors.ndim == 2
    if not is_table or len(words) != len(vectors) or not vectors.size or not np.isfinite(vectors).all():
        raise ValueError(
            f"{path} is no file of word vectors: words {words.dtype} {words.shape} and vectors {vectors.dtype} "
            f"{vectors.shape} are not one word and one row of finite float32 each; make one by mmmoe-data words"
        )
    return words.tolist(), vectors
