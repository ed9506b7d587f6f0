"""The base class of modality kinds, and the error of decoders. A kind turns bytes into an array (``decode``), counts
its tokens, combines the arrays of a microbatch (``collate``), and provides the module that embeds them
(``embedder``). The rest of the project uses a modality only through this class. The host's half is numpy, so that a
forked worker never touches torch's threads; nothing here imports torch, so that data preparation starts without it.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL.Image import Image as PILImage
from threadpoolctl import ThreadpoolController

from mmmoe_pretrain.config.base import ModalitySettings
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS
from mmmoe_pretrain.modalities.tokenizer import Tokenizer
from mmmoe_pretrain.modalities.transforms import Transform
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

if TYPE_CHECKING:
    from torch import Tensor, nn


class BadSampleError(Exception):
    """A sample's content cannot be used; the message has the reason."""


@functools.cache
def blas() -> ThreadpoolController:
    """The libraries by which numpy multiplies matrices. The first call asks the dynamic linker, whose lock a thread
    may hold where a process forks: a kind whose values take products calls it when it is built, before that."""
    return ThreadpoolController()


@contextmanager
def quarantine(what: str) -> Iterator[None]:
    """Turn a decoder's errors on damaged input into a BadSampleError that names ``what``."""
    try:
        yield
    except BadSampleError:
        raise
    except IMAGE_ERRORS as error:
        raise BadSampleError(f"{what} cannot be decoded: {decoder_reason(error)}") from error


@dataclass(frozen=True)
class Collated:
    """``arrays``: the arguments of the embedder's ``forward`` by name. ``starts``: int64 [n], the first row of the
    embedder's output of each value."""

    arrays: dict[str, np.ndarray]
    starts: np.ndarray


class Modality(abc.ABC):
    """One modality of a run: a kind under the user's ``name`` with its ``settings``.

    ``cut`` counts the values that were longer than the settings allow. ``transform_seconds`` is the part of all calls
    of ``decode`` that came after decoding (resize and crop, log-mel), where a kind measures it.
    """

    Settings: ClassVar[type[ModalitySettings]]
    formats: ClassVar[tuple[str, ...]]  # last parts of the extensions of files that are read, the preferred first
    default_field: ClassVar[str | None] = None  # of a sample's JSON, where one modality has the kind
    needs_tokenizer: ClassVar[bool] = False
    predictable: ClassVar[bool] = False  # tokens are discrete: ``keys`` are their ids, and a head can predict them
    hideable: ClassVar[bool] = False  # a value can be embedded without some tokens' content: ``hide``
    transform_seconds: float = 0.0
    label_probability: float = 0.0  # that a labelled sample has its class as a value, in training
    label_with: tuple[str, ...] = ()  # the modalities that it has beside, then; empty: all

    def __init__(self, name: str, settings: Any, tokenizer: Tokenizer | None = None) -> None:
        self.name, self.settings = name, settings
        self._tokenizer = tokenizer
        self.cut = 0

    @property
    def decoder(self) -> str:
        """The packages that decode it and their versions, for the log."""
        return ""

    @abc.abstractmethod
    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """The value of a file's bytes, augmented for training if a generator is given; None if it is empty.

        Raises BadSampleError where the content cannot be used.
        """

    def raw(self, data: bytes) -> str:
        """The text in the bytes, for reports; empty for other kinds."""
        return ""

    @abc.abstractmethod
    def num_tokens(self, value: np.ndarray) -> int:
        """Rows that the embedder makes of ``value``."""

    def keys(self, value: np.ndarray) -> np.ndarray:
        """int64 [num_tokens]: an identity of each token; its number, unless tokens are discrete."""
        return np.arange(self.num_tokens(value))

    @property
    def marks(self) -> tuple[int, int]:
        """The ids that begin and end every value. Of kinds that are ``predictable``."""
        raise NotImplementedError

    def token_inputs(self, ids_S: Tensor, places_S: Tensor) -> dict[str, Tensor]:
        """The arguments of the embedder's ``forward`` for single tokens with these ids, each at this number in its
        value. Of kinds that are ``predictable``."""
        raise NotImplementedError

    def may_follow(self, vocab_size: int) -> np.ndarray:
        """bool [vocab_size]: the ids that may stand behind the begin mark. Of kinds that are ``predictable``."""
        return np.arange(vocab_size) != self.marks[0]

    def text_of(self, value: np.ndarray) -> str | None:
        """The text that ``value`` is; None for other kinds."""
        return None

    def may_hide(self, value: np.ndarray) -> np.ndarray:
        """int64: the numbers of the tokens that ``hide`` may be asked to hide."""
        return np.arange(self.num_tokens(value))

    @property
    def fixed_places(self) -> bool:
        """Whether token i is at the same place in every value."""
        return True

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """A copy of ``value`` with as many tokens, of which those in ``hidden``, bool [num_tokens], say nothing about
        what was there. Of kinds that are ``hideable``."""
        raise NotImplementedError

    def contents(self, value: np.ndarray) -> np.ndarray:
        """float32 [num_tokens, content_size]: the numbers that each token is made of, of about unit size, NaN where
        nothing was measured. Of kinds that are ``hideable`` and not ``predictable``."""
        raise NotImplementedError

    def rebuilt(self, content: np.ndarray) -> np.ndarray:
        """The value with this content: of ``contents``, or of discrete tokens their ids after the begin mark, up to
        the first end mark. Of kinds that are ``hideable``."""
        raise NotImplementedError

    def words(self, value: np.ndarray) -> str | None:
        """``value`` as a text; None where it is not one."""
        return None

    def audible(self, value: np.ndarray) -> tuple[np.ndarray, int] | None:
        """A sound as near as may be to ``value``, float32 [samples] between -1 and 1, and its rate; None for other
        kinds."""
        return None

    @property
    def transforms(self) -> Mapping[str, Transform]:
        """Changes of a value that make a view of it, by the name that a config gives."""
        return {}

    @property
    def content_size(self) -> int:
        """Numbers of a token's content; 0 of kinds that have none."""
        return 0

    @abc.abstractmethod
    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        """Any number of values, also none, as one input of the embedder."""

    @property
    @abc.abstractmethod
    def max_tokens(self) -> int:
        """The tokens of the longest value."""

    @property
    def rotary(self) -> bool:
        """Whether attention rotates queries and keys by their positions; otherwise the embedder adds positions."""
        return bool(self.settings.positions == "rotary")

    @abc.abstractmethod
    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        """The module whose ``forward(**arrays)`` gives rows [n, hidden_size]. Without values it returns no rows, and
        every parameter still gets a zero gradient. ``vocab_size``: the tokenizer's, 0 where the run has none."""

    @abc.abstractmethod
    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        """The position of token number ``token`` in ``value``, for a report in JSON."""

    def excerpt(self, value: np.ndarray, token: int) -> tuple[str, str, str] | None:
        """A few words before the token, its own text, and a few words after it; None where a value is not a text."""
        return None

    def draw(self, value: np.ndarray, token: int) -> tuple[PILImage, tuple[float, float, float, float]] | None:
        """An image of ``value``, and the box (left, top, right, bottom) of the token in it as shares of its sides;
        None where the words of ``describe`` are enough."""
        return None

    def sound(self, data: bytes) -> tuple[np.ndarray, int] | None:
        """The sound in a file's bytes, float32 [samples] between -1 and 1, and its rate; None for other kinds.
        ``describe`` then gives the ``seconds`` at which a token begins and ends in it."""
        return None

    def render(self, ids: np.ndarray) -> tuple[bytes, str]:
        """A file of the value with these ids, with or without its marks, and the file's extension. Of kinds that are
        ``predictable`` and whose tokens can become a file."""
        raise NotImplementedError

    @abc.abstractmethod
    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        """A random value, for tests and measurements; no tokenizer is read for it."""
