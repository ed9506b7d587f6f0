"""The modalities: one file each, and this explicit table of them.

A new modality is one file with a codec and an embedder, a line in each of the two functions
below, a name in ``batch.MODALITIES`` and a section of the config.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmmoe_pretrain.config import ModalitiesConfig, RunConfig
from mmmoe_pretrain.modalities.audio import AudioCodec, AudioEmbedder
from mmmoe_pretrain.modalities.errors import BadSampleError
from mmmoe_pretrain.modalities.image import ImageCodec, ImageEmbedder
from mmmoe_pretrain.modalities.text import TextCodec, TextEmbedder, copy_tokenizer
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

__all__ = [
    "AudioCodec",
    "AudioEmbedder",
    "BadSampleError",
    "Codecs",
    "ImageCodec",
    "ImageEmbedder",
    "TextCodec",
    "TextEmbedder",
    "build_codecs",
    "build_embedders",
    "copy_tokenizer",
]


@dataclass(frozen=True)
class Codecs:
    """What turns the bytes of each modality into arrays."""

    image: ImageCodec
    audio: AudioCodec
    text: TextCodec


def build_codecs(config: RunConfig, expected_fingerprint: str | None = None) -> Codecs:
    """The codecs of a run; with a fingerprint the tokenizer must be that one."""
    return Codecs(
        image=ImageCodec(config.modalities.image, config.data.image_flip),
        audio=AudioCodec(config.modalities.audio),
        text=TextCodec(config.data.tokenizer, config.modalities.text, expected_fingerprint=expected_fingerprint),
    )


def build_embedders(
    config: ModalitiesConfig, hidden_size: int, vocab_size: int, groups: Groups = SINGLE
) -> dict[str, nn.Module]:
    """The embedder of each modality by name; text's also takes the tokens' positions. Every tensor rank
    computes all rows alike."""
    return {
        "image": ImageEmbedder(config.image, hidden_size),
        "audio": AudioEmbedder(config.audio, hidden_size),
        "text": TextEmbedder(vocab_size, hidden_size, config.text, groups),
    }
