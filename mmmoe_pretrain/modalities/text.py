"""Text: sentencepiece ids between a begin and an end mark, and the table that embeds them. ``Discrete`` is what codes
(``codes.py``) have in common with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.limits import MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.modalities.base import BadSampleError, Collated, Modality, ModalitySettings
from mmmoe_pretrain.modalities.tokenizer import Tokenizer
from mmmoe_pretrain.modalities.transforms import TEXT, Transform
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import vocab_embedding

MARKS = 2  # begin and end
HIDDEN = 0  # the id of hidden pieces, <pad> or <unk> in most tokenizers: any that says nothing about the piece
CONTEXT = 48  # characters shown on either side of a piece in a report


class TextSettings(ModalitySettings):
    """``dropout``: sentencepiece subword regularisation in training (BPE dropout). With probability
    ``label_probability`` a sample that has a label gets its class in ``evaluate.prompt`` as its text, and keeps only
    its modalities in ``label_with`` (empty: all)."""

    not_of_the_model = ("dropout", "label_probability", "label_with")

    kind: Literal["text"] = "text"
    max_tokens: int = Field(48, ge=2)  # longer texts are cut, and counted
    positions: Literal["learned", "rotary"] = "rotary"
    dropout: float = Field(0.0, ge=0, lt=1)
    label_probability: float = Field(0.0, ge=0, le=1)
    label_with: tuple[str, ...] = ()

    def check_names(self, name: str, modalities: Mapping[str, ModalitySettings]) -> None:
        """See ``ModalitySettings.check_names``."""
        if unknown := [other for other in self.label_with if other not in modalities or other == name]:
            raise ValueError(
                f"modalities.{name}.label_with {', '.join(unknown)}: it names other modalities, and those are "
                f"{', '.join(other for other in modalities if other != name) or 'none'}"
            )


@functools.lru_cache(maxsize=16)  # a loader asks for the text of a sample up to three times
def _text_of(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {len(data)} bytes exceeds the limit of {MAX_TEXT_BYTES}")
    try:
        text = data.decode("utf-8-sig")  # editors of Windows begin files with a byte order mark
    except UnicodeDecodeError as error:
        raise BadSampleError(f"text is not UTF-8: {error}") from error
    return text.strip() if has_text(text) else ""


class Discrete(Modality):
    """A value is int64 ids [n] of discrete tokens between a begin and an end mark."""

    predictable = True
    hideable = True

    def num_tokens(self, value: np.ndarray) -> int:
        return len(value)

    def keys(self, value: np.ndarray) -> np.ndarray:
        return value

    def token_inputs(self, ids_S: Tensor, places_S: Tensor) -> dict[str, Tensor]:
        return {"ids": ids_S, "positions": places_S}

    def may_hide(self, value: np.ndarray) -> np.ndarray:
        """See ``Modality.may_hide``: the tokens without the marks."""
        return np.arange(1, len(value) - 1)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        lengths = np.asarray([len(value) for value in values], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        nothing = np.zeros(0, dtype=np.int64)
        positions = np.concatenate([nothing, *(np.arange(n) for n in lengths.tolist())])
        return Collated({"ids": np.concatenate([nothing, *values]), "positions": positions}, starts)

    @property
    def max_tokens(self) -> int:
        return int(self.settings.max_tokens) + MARKS


class Text(Discrete):
    """A value is int64 ids [n] with its marks: begin, at most ``max_tokens`` pieces, end."""

    Settings = TextSettings
    formats = READS["text"].formats
    default_field = READS["text"].field
    needs_tokenizer = True

    def __init__(self, name: str, settings: TextSettings, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(name, settings, tokenizer)
        self.label_probability, self.label_with = settings.label_probability, settings.label_with

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "a modality that reads text was built without its tokenizer"
        return self._tokenizer

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``; a text that is blank, or that the tokenizer drops whole, has no value."""
        ids = self.tokenizer.encode(self.raw(data), rng, self.settings.dropout)
        if not len(ids):
            return None
        if len(ids) > self.settings.max_tokens:
            self.cut += 1
        marks = self.tokenizer
        return np.concatenate([[marks.bos_id], ids[: self.settings.max_tokens], [marks.eos_id]])

    def raw(self, data: bytes) -> str:
        return _text_of(data)

    @property
    def marks(self) -> tuple[int, int]:
        return self.tokenizer.bos_id, self.tokenizer.eos_id

    def may_follow(self, vocab_size: int) -> np.ndarray:
        """See ``Modality.may_follow``: pieces of a text, and the end mark."""
        allowed = np.ones(vocab_size, dtype=bool)
        allowed[list(self.tokenizer.silent_ids - {self.tokenizer.eos_id})] = False
        return allowed

    def text_of(self, value: np.ndarray) -> str:
        return self.tokenizer.decode(value)

    def rebuilt(self, content: np.ndarray) -> np.ndarray:
        """See ``Modality.rebuilt``; a text without an end mark gets one."""
        marks = self.tokenizer
        ends = np.flatnonzero(content == marks.eos_id)
        pieces = content[: int(ends[0]) if len(ends) else self.settings.max_tokens]
        return np.concatenate([[marks.bos_id], pieces, [marks.eos_id]]).astype(np.int64)

    @property
    def transforms(self) -> Mapping[str, Transform]:
        return TEXT

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See ``Modality.hide``: one piece stands for all that are hidden."""
        return np.where(hidden, HIDDEN, value)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return TextEmbedder(vocab_size, hidden_size, self.settings, groups)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"piece": self._shown(int(value[token])), "of": self.tokenizer.decode(value)}

    def words(self, value: np.ndarray) -> str | None:
        return self.tokenizer.decode(value)

    def excerpt(self, value: np.ndarray, token: int) -> tuple[str, str, str] | None:
        """See ``Modality.excerpt``; at most ``CONTEXT`` characters on either side, and marks are named."""
        pieces = [self._piece(int(token_id)) for token_id in value]
        before, after = ("".join(pieces[part]) for part in (slice(1, max(1, token)), slice(token + 1, -1)))
        piece = pieces[token]
        gap = " " if piece != piece.lstrip() and before else ""
        before = before.lstrip()
        before = before if len(before) <= CONTEXT else "…" + before[-CONTEXT:]
        after = after if len(after) <= CONTEXT else after[:CONTEXT] + "…"
        return before + gap, self._shown(int(value[token])), after

    def _shown(self, token_id: int) -> str:
        return self._piece(token_id).strip() or "␣"  # a piece can be the space alone

    def _piece(self, token_id: int) -> str:
        """As it occurs in a text, with the space before a word."""
        marks = {self.tokenizer.bos_id: "⟨begin⟩", self.tokenizer.eos_id: "⟨end⟩"}
        return marks.get(token_id) or self.tokenizer.piece(token_id).replace("\u2581", " ")

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        """See ``Modality.example``; its marks are of noise, too."""
        return rng.integers(0, vocab_size, MARKS + int(rng.integers(1, self.settings.max_tokens + 1)))


class TextEmbedder(nn.Module):
    """ids [n] -> [n, D]; ``positions`` [n] count from the begin mark of each text."""

    def __init__(self, vocab_size: int, hidden_size: int, settings: TextSettings, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.table = vocab_embedding(vocab_size, hidden_size, groups)
        nn.init.normal_(self.table.get_parameter("weight"), std=0.02)
        self.positions: nn.Parameter | None = None
        if settings.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(settings.max_tokens + MARKS, hidden_size))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        rows = self.table(ids)
        return rows if self.positions is None else rows + self.positions[positions]
