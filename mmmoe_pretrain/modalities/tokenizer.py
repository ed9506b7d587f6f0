"""The tokenizer: a sentencepiece model, its file's checks, its fingerprint and subword dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
import xxhash

from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.untrusted import read_bytes


class Tokenizer:
    """Text -> ids and back."""

    def __init__(self, model_path: str | Path, *, expected_fingerprint: str | None = None) -> None:
        data = _read_model(Path(model_path))
        self.fingerprint = xxhash.xxh3_128_hexdigest(data)
        _check_fingerprint(self.fingerprint, expected_fingerprint, model_path)
        self._model = _load_model(data, model_path)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        self._splits: dict[int, list[tuple[int, int]]] = {}  # of pieces: what they can fall apart into
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                f"tokenizer {model_path} has no begin or end mark (ids {self.bos_id}, "
                f"{self.eos_id}); train one by mmmoe-data tokenizer"
            )

    def encode(self, text: str, rng: np.random.Generator | None = None, dropout: float = 0.0) -> np.ndarray:
        """int64 ids [n], without marks.

        With ``rng`` each piece falls apart into two pieces of the vocabulary with probability
        ``dropout``, and so do those: the effect of BPE dropout (arXiv 1910.13267) as a pure function
        of the generator, which sentencepiece's own sampling (one global seed) is not.
        """
        ids: list[int] = self._model.encode(text)
        if rng is not None and dropout > 0:
            ids = self._drop(ids, rng, dropout)
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of ``ids``; marks leave no trace."""
        return self._model.decode([int(i) for i in ids])

    @property
    def silent_ids(self) -> set[int]:
        """Ids that are no piece of a text: marks, padding and what stands for an unknown letter."""
        model = self._model
        return {i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)}

    def piece(self, token_id: int) -> str:
        """The piece of the vocabulary; a word's first one begins with U+2581."""
        return str(self._model.id_to_piece(int(token_id)))

    def _drop(self, ids: list[int], rng: np.random.Generator, dropout: float) -> list[int]:
        stack, out = ids[::-1], []
        while stack:
            piece = stack.pop()
            splits = self._split_points(piece)
            if splits and rng.random() < dropout:
                left, right = splits[int(rng.integers(len(splits)))]
                stack += (right, left)
            else:
                out.append(piece)
        return out

    def _split_points(self, piece: int) -> list[tuple[int, int]]:
        """The ways to write a piece as two pieces of the vocabulary."""
        if piece not in self._splits:
            text = self._model.id_to_piece(piece)
            special = self._model.is_control(piece) or self._model.is_unknown(piece) or self._model.is_byte(piece)
            halves = [] if special else [(text[:i], text[i:]) for i in range(1, len(text))]
            pairs = [tuple(self._model.piece_to_id(half) for half in pair) for pair in halves]
            self._splits[piece] = [(a, b) for a, b in pairs if self.unk_id not in (a, b)]
        return self._splits[piece]


def copy_tokenizer(path: str | Path, to: Path, fingerprint: str) -> None:
    """Raises ValueError where ``path`` is not the tokenizer of ``fingerprint``."""
    data = _read_model(Path(path))
    _check_fingerprint(xxhash.xxh3_128_hexdigest(data), fingerprint, path)
    to.write_bytes(data)


def _check_fingerprint(found: str, expected: str | None, path: str | Path) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f"tokenizer {path} has fingerprint {found}, but the run was made with {expected}; set data.tokenizer to "
            f"the file that the run started with"
        )


def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}; give data.tokenizer=FILE, or make one by mmmoe-data tokenizer")
    return read_bytes(path, MAX_MEMBER_BYTES)


def _load_model(data: bytes, path: str | Path) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        model.id_to_piece(list(range(model.vocab_size())))  # each is decoded
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a sentencepiece model ({error}); make one by mmmoe-data tokenizer") from None
    return model
