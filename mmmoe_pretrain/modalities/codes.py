"""Codes of another modality's values as discrete tokens (``fsq.py``), which an objective can predict and which become
a file again. A subclass says what it reads and how codes are ordered.

A value is int64 ids between a begin and an end mark: codes are 0 to ``codes`` - 1, behind them are the two marks.
They are ids of the modality's own vocabulary, with a table and a head of its own: those of texts are not concerned.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field
from torch import nn

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import PathText
from mmmoe_pretrain.modalities.base import Modality, ModalitySettings, blas
from mmmoe_pretrain.modalities.fsq import MOST_CODES, Codebook
from mmmoe_pretrain.modalities.text import MARKS, Discrete, TextEmbedder
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

OF_KIND = "{}_codes"  # the kind of codes of a kind's values
MULTIPLE = 8  # of the ids of a vocabulary, so that tensor parallelism can cut it; the last ones are never used


class CodesSettings(ModalitySettings):
    """``tokenizer``: a file of `mmmoe-data codes`, which prints the other numbers, too. ``codes``: that it has.
    ``max_tokens``: codes of a value, at most. ``fingerprint``: of the file; filled in when the run starts."""

    file_setting = "tokenizer"
    not_of_the_model = ("tokenizer",)

    tokenizer: PathText
    codes: int = Field(ge=2, le=MOST_CODES)
    max_tokens: int = Field(ge=1)
    positions: Literal["learned", "rotary"] = "learned"
    fingerprint: str = ""

    @property
    def vocabulary(self) -> int:
        """See ``ModalitySettings.vocabulary``."""
        return -(-(self.codes + MARKS) // MULTIPLE) * MULTIPLE

    def with_file(self) -> Self:
        """See ``FileSettings.with_file``."""
        return self.model_copy(update={"fingerprint": self.read().fingerprint})

    def read(self) -> Codebook:
        """The tokenizer. Raises ValueError where it is not that of the run, or has other sizes."""
        book = Codebook.read(self.file, expected_fingerprint=self.fingerprint)
        if (kind := OF_KIND.format(book.media.get("kind"))) != self.kind:
            raise ValueError(
                f"{self.file} has codes for kind {kind}, and the modality has kind {self.kind}; name another file, "
                f"or correct kind"
            )
        if book.codes != self.codes:
            raise ValueError(
                f"the tokenizer {self.file} has {book.codes} codes, and the modality codes: {self.codes}; set codes: "
                f"{book.codes}, or name another file"
            )
        if problem := kinds.MODALITIES.load(self.kind).size_problem(book, self.max_tokens):
            raise ValueError(f"the modality of the tokenizer {self.file} has max_tokens {self.max_tokens}: {problem}")
        return book


class Codes(Discrete):
    """See the module."""

    Settings: ClassVar[type[CodesSettings]]
    media_defaults: ClassVar[Mapping[str, Any]] = {}  # settings of what it reads that suit a tokenizer
    patch: ClassVar[tuple[int, int]]  # of a code, that suits it

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        blas()

    @functools.cached_property
    def book(self) -> Codebook:
        """Read when the first value is decoded: sizes and tables need no file."""
        return self.settings.read()

    @functools.cached_property
    def media(self) -> Modality:
        settings = kinds.MODALITIES.settings(self.book.media)
        kind: type[Modality] = kinds.MODALITIES.load(str(self.book.media["kind"]))
        return kind(self.name, settings)

    @staticmethod
    @abc.abstractmethod
    def check_patch(media: Any, patch: tuple[int, int]) -> None:
        """Raises ValueError where values with the settings ``media`` are not of whole patches."""

    @staticmethod
    @abc.abstractmethod
    def grid(value: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
        """A value of what it reads as float32 [C, H, W] of whole patches."""

    @abc.abstractmethod
    def rendered(self, grid: np.ndarray) -> tuple[bytes, str]:
        """The inverse: a file of it, and its extension."""

    @staticmethod
    @abc.abstractmethod
    def sizes(book: Codebook) -> dict[str, int]:
        """The settings ``codes`` and ``max_tokens`` that suit ``book``."""

    @staticmethod
    @abc.abstractmethod
    def size_problem(book: Codebook, max_tokens: int) -> str:
        """Why ``book`` cannot have so many codes a value, and the remedy; or nothing."""

    @abc.abstractmethod
    def ordered(self, codes: np.ndarray) -> np.ndarray:
        """[rows, columns] -> [n], at most ``max_tokens``."""

    @abc.abstractmethod
    def placed(self, codes: np.ndarray) -> np.ndarray:
        """The inverse, of any number of codes: [n] -> [rows, columns]."""

    @property
    def marks(self) -> tuple[int, int]:
        """The ids that begin and end every value."""
        return self.settings.codes, self.settings.codes + 1

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``; codes are of files as they are, without augmentation."""
        value = self.media.decode(data)
        if value is None:
            return None
        began, end = self.marks
        codes = self.ordered(self.book.encode(self.grid(value, self.book.network.patch)))
        return np.concatenate([[began], codes, [end]])

    def render(self, ids: np.ndarray) -> tuple[bytes, str]:
        """See ``Modality.render``; ids that are no codes are left out."""
        codes = np.asarray(ids, dtype=np.int64)
        return self.rendered(self.book.decode(self.placed(codes[(codes >= 0) & (codes < self.settings.codes)])))

    def may_follow(self, vocab_size: int) -> np.ndarray:
        """bool [vocab_size]: the ids that may stand behind the begin mark: codes, and the end mark."""
        return (np.arange(vocab_size) < self.settings.codes) | (np.arange(vocab_size) == self.marks[1])

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See ``Modality.hide``: the begin mark stands for all that are hidden."""
        return np.where(hidden, self.marks[0], value)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return TextEmbedder(self.settings.vocabulary, hidden_size, self.settings, groups)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"code": int(value[token]), "number": token}

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        """See ``Modality.example``; as long as a value can be."""
        began, end = self.marks
        return np.concatenate([[began], rng.integers(0, self.settings.codes, self.settings.max_tokens), [end]])
