"""The values that travel from the loader to the model: one sample, and one packed microbatch.

Owns the vocabulary of modalities and the shape legend of the whole project; knows nothing of
files, models or communication.

Shape legend: B samples in a microbatch, T tokens in the stream, S segments, D hidden size,
H heads, F expert hidden size, E experts, E_local experts on this rank, K experts a token,
C capacity, M modalities, X tasks, V vocabulary. A tensor whose layout is not obvious carries it as a
suffix: ``x_TD``, ``expert_ids_TK``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODALITIES: tuple[str, ...] = ("image", "audio", "text")
MODALITY_ID: dict[str, int] = {name: i for i, name in enumerate(MODALITIES)}
TASKS: tuple[str, ...] = ("contrastive", "captioning")  # what a segment is trained for
TASK_ID: dict[str, int] = {name: i for i, name in enumerate(TASKS)}
IGNORE = -100  # a target that takes no part in a loss


@dataclass(frozen=True)
class SampleMeta:
    """What is known of a sample beside its content; every field but ``key`` may be empty. Several shards may use
    a key."""

    key: str
    group: str = ""  # samples that show the same thing share a group and are never negatives
    language: str = ""
    label: str = ""
    subset: str = ""
    audio_kind: str = ""  # "speech" or "effect"
    source: str = ""
    shard: str = ""  # the file that holds it

    @property
    def identity(self) -> str:
        """What no other sample has."""
        return f"\0{self.shard}\0{self.key}"

    @property
    def own_group(self) -> str:
        """The group; a sample without one is a group of its own."""
        return self.group or self.identity


@dataclass(frozen=True)
class Sample:
    """One decoded sample; a modality that it lacks is None.

    ``image``: uint8 [3, size, size]. ``audio``: float32 log-mel [n_mels, frames].
    ``text``: int64 token ids [n], without begin or end marks.
    """

    meta: SampleMeta
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    text: np.ndarray | None = None
    raw_text: str = ""

    def has(self, modality: str) -> bool:
        """True if the sample carries ``modality``."""
        return getattr(self, modality) is not None


@dataclass(frozen=True)
class Segments:
    """The segments of a stream in their order, as numbers of tokens [S], known on the host.

    Tokens of a segment attend to each other. In a segment with a prefix (``prefixes`` > 0) the prefix attends to
    itself, and what follows it to the prefix and, causally, to itself.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One packed microbatch: raw inputs by modality, and the stream that is laid over them.

    An embedder turns the inputs of modality m into rows ``[rows_m, D]``; the stream takes
    ``emb_m[source[m]]`` at its rows ``rows[m]``. One image may stand in the stream twice (in
    its own segment and as the prefix of a caption) and is embedded once.

    Segments with ``pool_sample[s] >= 0`` are *unimodal*: all tokens of one modality of one
    sample, attending to each other in both directions, pooled for contrastive objectives.
    The others are *fused*: a prefix (image or audio) and a text that attends causally.
    """

    images: Tensor  # uint8 [n_image, 3, size, size]
    audio: Tensor  # float32 [n_audio, n_mels, frames]; padded with the codec's silence
    audio_frames: Tensor  # int64 [n_audio]: valid frames
    text_ids: Tensor  # int64 [n_text_tokens]: all text inputs, begin marks included
    modality_ids: Tensor  # int64 [T]; padding carries 0 and valid = False
    segment_ids: Tensor  # int64 [T]; padding carries -1
    positions: Tensor  # int64 [T]: position within the modality's run inside its segment
    valid: Tensor  # bool [T]
    targets: Tensor  # int64 [T]: next token of a caption, else IGNORE
    rows: tuple[Tensor, ...]  # by modality: rows of the stream, int64 [n]
    source: tuple[Tensor, ...]  # by modality: rows of the embedder's output, int64 [n]
    segments: Segments
    pool_sample: Tensor  # int64 [S]: sample of a unimodal segment, else -1
    pool_modality: Tensor  # int64 [S]: its modality, else -1
    present_MB: Tensor  # bool [M, B]: sample b has a unimodal segment of modality m
    group_ids: Tensor  # int64 [B]: hash of the sample's group
    metas: tuple[SampleMeta, ...]  # [B]; a skipped sample has present_MB False everywhere

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.valid.shape[0])

    @property
    def num_valid(self) -> int:
        """Tokens without padding; known on the host, so that no GPU is waited for."""
        return sum(rows.shape[0] for rows in self.rows)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on ``device``."""
        return dataclasses.replace(
            self, **{f.name: _move(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        )


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    return value
