"""Vectors of words: the file that `mmmoe-data words` writes, its checks, its fingerprint, and the rule of words."""

from __future__ import annotations

import io
import re
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import xxhash

from mmmoe_pretrain.untrusted import read_bytes

MAX_BYTES = 1 << 32
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The runs of letters and digits of ``text``, without case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


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
            words, vectors = file["words"], file["vectors"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of word vectors ({error}); make one by mmmoe-data words") from None
    is_table = words.dtype.kind == "U" and vectors.dtype == np.float32 and words.ndim == 1 and vectors.ndim == 2
    if not is_table or len(words) != len(vectors) or not vectors.size or not np.isfinite(vectors).all():
        raise ValueError(
            f"{path} is no file of word vectors: words {words.dtype} {words.shape} and vectors {vectors.dtype} "
            f"{vectors.shape} are not one word and one row of finite float32 each; make one by mmmoe-data words"
        )
    return words.tolist(), vectors
