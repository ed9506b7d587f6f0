"""Samples -> one packed microbatch (the contract is batch.Batch).

Owns the layout of the stream: a unimodal segment for each modality of each sample, then the fused
segments [prefix | begin t1 .. tn] of the samples drawn for captioning, then padding. Also owns
that draw, a pure function of (seed, position). Everything is numpy until the last step.

Shapes: B samples, T tokens, S segments, R runs (a segment is one run, a fused one two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from mmmoe_pretrain.batch import IGNORE, MODALITIES, MODALITY_ID, Batch, Sample, Segments
from mmmoe_pretrain.config import CaptioningConfig, ModalitiesConfig, RunConfig
from mmmoe_pretrain.data.order import fold
from mmmoe_pretrain.modalities import Codecs

TOKEN_MULTIPLE = 64
IMAGE, AUDIO, TEXT = (MODALITY_ID[name] for name in ("image", "audio", "text"))


@dataclass(frozen=True)
class PackSettings:
    """What packing depends on beside the samples. ``captioning`` None makes no fused segments."""

    modalities: ModalitiesConfig
    bos_id: int
    eos_id: int
    captioning: CaptioningConfig | None
    seed: int

    @classmethod
    def from_config(cls, config: RunConfig, codecs: Codecs) -> PackSettings:
        captioning = config.objectives.captioning
        return cls(
            config.modalities,
            codecs.text.bos_id,
            codecs.text.eos_id,
            captioning if captioning.weight > 0 else None,
            config.seed,
        )


@dataclass(frozen=True)
class _Runs:
    """Runs [R] in the order of the stream, and the segments [S] that they make up."""

    modality: np.ndarray
    segment: np.ndarray
    length: np.ndarray
    source_start: np.ndarray  # first row of the embedder's output
    pool_sample: np.ndarray
    pool_modality: np.ndarray
    prefix_length: np.ndarray  # [S]: 0 where unimodal
    text_ids: np.ndarray
    text_targets: np.ndarray  # next token of each text id, IGNORE outside of captions


def pack(
    samples: Sequence[Sample],
    settings: PackSettings,
    positions: Sequence[int] | np.ndarray | None = None,
    tokens: int | None = None,
) -> Batch:
    """Lay ``samples`` out as one stream of ``tokens`` rows, or of as few as a multiple of 64 allows.

    ``positions`` are the samples' global positions, for the captioning draw (default: 0, 1, ...).
    A sample without any modality keeps its slot and takes no row.
    """
    if positions is None:
        positions = np.arange(len(samples))
    audio, audio_frames = _stack_audio(samples, settings)
    runs = _lay_out(
        samples,
        settings,
        np.asarray(positions, dtype=np.int64),
        audio.shape[2] // settings.modalities.audio.patch,
    )
    used = int(runs.length.sum())
    total = _budget(used, tokens, len(samples))
    return Batch(
        images=torch.from_numpy(_stack_images(samples, settings)),
        audio=torch.from_numpy(audio),
        audio_frames=torch.from_numpy(audio_frames),
        text_ids=torch.from_numpy(runs.text_ids),
        **_stream(runs, used, total),
        segments=_segments(runs),
        pool_sample=torch.from_numpy(runs.pool_sample),
        pool_modality=torch.from_numpy(runs.pool_modality),
        present_MB=torch.from_numpy(_present(samples)),
        group_ids=torch.from_numpy(_group_ids(samples)),
        metas=tuple(sample.meta for sample in samples),
    )


def max_tokens_per_sample(settings: PackSettings) -> int:
    """The longest stretch that one sample can take: a fixed budget of B times this always fits."""
    config = settings.modalities
    lengths = {"image": config.image.num_tokens, "audio": config.audio.max_tokens}
    text = config.text.max_tokens
    fused = 0
    if settings.captioning is not None and settings.captioning.prefixes:
        fused = max(lengths[name] for name in settings.captioning.prefixes) + text + 1
    return sum(lengths.values()) + text + 2 + fused


def _present(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([[sample.has(name) for sample in samples] for name in MODALITIES], dtype=bool).reshape(
        len(MODALITIES), len(samples)
    )


def _group_ids(samples: Sequence[Sample]) -> np.ndarray:
    hashes = [xxhash.xxh3_64_intdigest(sample.meta.own_group.encode()) for sample in samples]
    return np.asarray(hashes, dtype=np.uint64).view(np.int64)


def _stack_images(samples: Sequence[Sample], settings: PackSettings) -> np.ndarray:
    size = settings.modalities.image.size
    images = [sample.image for sample in samples if sample.image is not None]
    return np.stack(images) if images else np.zeros((0, 3, size, size), dtype=np.uint8)


def _stack_audio(samples: Sequence[Sample], settings: PackSettings) -> tuple[np.ndarray, np.ndarray]:
    """Clips padded to the longest one, rounded up to whole tokens; and their valid frames."""
    config = settings.modalities.audio
    clips = [sample.audio for sample in samples if sample.audio is not None]
    frames = np.asarray([clip.shape[1] for clip in clips], dtype=np.int64)
    padded = -(-int(frames.max(initial=1)) // config.patch) * config.patch
    out = np.zeros((len(clips), config.n_mels, padded), dtype=np.float32)
    for i, clip in enumerate(clips):
        out[i, :, : clip.shape[1]] = clip
        out[i, :, clip.shape[1] :] = clip.min()
    return out, frames


def _prefixes(samples: Sequence[Sample], settings: PackSettings, positions: np.ndarray) -> list[int]:
    """By sample: the modality that captions start from, or -1 where the sample gets no fused segment."""
    captioning = settings.captioning
    if captioning is None:
        return [-1] * len(samples)
    draws = fold(settings.seed + 2, positions)
    drawn = (draws >> np.uint64(32)).astype(np.float64) / 2**32 < captioning.fraction
    chosen = []
    for sample, is_drawn, draw in zip(samples, drawn, draws.tolist(), strict=True):
        options = [MODALITY_ID[name] for name in captioning.prefixes if sample.has(name)]
        fits = is_drawn and options and sample.text is not None
        chosen.append(options[(draw & 0xFFFFFFFF) % len(options)] if fits else -1)
    return chosen


class _Layout:
    """Runs, segments and text ids in the order in which they are added."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, int, int]] = []  # modality, segment, length, source_start
        self._segments: list[tuple[int, int, int]] = []  # pool_sample, pool_modality, prefix_length
        self._ids: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._targets: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._num_ids = 0

    def add_segment(self, *runs: tuple[int, int, int], sample: int = -1, modality: int = -1, prefix: int = 0) -> None:
        """Append a segment of ``runs`` (modality, length, source_start)."""
        self._runs += [(m, len(self._segments), length, start) for m, length, start in runs]
        self._segments.append((sample, modality, prefix))

    def add_text(self, ids: np.ndarray, targets: np.ndarray) -> tuple[int, int, int]:
        """Append text inputs; returns their run."""
        self._ids.append(ids)
        self._targets.append(targets)
        self._num_ids += len(ids)
        return TEXT, len(ids), self._num_ids - len(ids)

    def runs(self) -> _Runs:
        run_R4 = np.asarray(self._runs, dtype=np.int64).reshape(-1, 4)
        segment_S3 = np.asarray(self._segments, dtype=np.int64).reshape(-1, 3)
        modality, segment, length, source_start = run_R4.T
        pool_sample, pool_modality, prefix_length = segment_S3.T
        return _Runs(
            modality,
            segment,
            length,
            source_start,
            pool_sample,
            pool_modality,
            prefix_length,
            np.concatenate(self._ids),
            np.concatenate(self._targets),
        )


def _lay_out(samples: Sequence[Sample], settings: PackSettings, positions: np.ndarray, clip_rows: int) -> _Runs:
    """``clip_rows``: rows that the audio embedder makes of one padded clip."""
    config, layout = settings.modalities, _Layout()
    begin, end = np.asarray([settings.bos_id]), np.asarray([settings.eos_id])
    run_of: dict[tuple[int, int], tuple[int, int, int]] = {}  # (sample, modality) -> run
    images = clips = 0
    for b, sample in enumerate(samples):
        if sample.image is not None:
            run_of[b, IMAGE] = IMAGE, config.image.num_tokens, images * config.image.num_tokens
            images += 1
        if sample.audio is not None:
            run_of[b, AUDIO] = AUDIO, -(-sample.audio.shape[1] // config.audio.patch), clips * clip_rows
            clips += 1
        if sample.text is not None:
            ids = np.concatenate([begin, sample.text, end])
            run_of[b, TEXT] = layout.add_text(ids, np.full(len(ids), IGNORE))
    for (b, modality), run in run_of.items():
        layout.add_segment(run, sample=b, modality=modality)
    for b, modality in enumerate(_prefixes(samples, settings, positions)):
        text = samples[b].text
        if modality >= 0 and text is not None:
            prefix = run_of[b, modality]
            caption = layout.add_text(np.concatenate([begin, text]), np.concatenate([text, end]))
            layout.add_segment(prefix, caption, prefix=prefix[1])
    return layout.runs()


def _budget(used: int, tokens: int | None, num_samples: int) -> int:
    if tokens is None:
        return max(1, -(-used // TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
    if used > tokens:
        raise ValueError(
            f"{num_samples} samples take {used} tokens, but the budget is {tokens}; raise it "
            f"to at least {used}, put fewer samples into a microbatch (train.num_microbatches), or "
            f"shorten modalities.audio.max_seconds or modalities.text.max_tokens"
        )
    return tokens


def _stream(runs: _Runs, used: int, total: int) -> dict[str, Any]:
    starts = np.cumsum(runs.length) - runs.length
    modality = np.repeat(runs.modality, runs.length)
    position = np.arange(used) - np.repeat(starts, runs.length)
    source = np.repeat(runs.source_start, runs.length) + position
    rows = [np.flatnonzero(modality == m) for m in range(len(MODALITIES))]
    targets = np.full(total, IGNORE, dtype=np.int64)
    targets[rows[TEXT]] = runs.text_targets
    return {
        "modality_ids": _padded(modality, total, 0),
        "segment_ids": _padded(np.repeat(runs.segment, runs.length), total, -1),
        "positions": _padded(position, total, 0),
        "valid": torch.from_numpy(np.arange(total) < used),
        "targets": torch.from_numpy(targets),
        "rows": tuple(torch.from_numpy(row) for row in rows),
        "source": tuple(torch.from_numpy(source[row]) for row in rows),
    }


def _padded(values: np.ndarray, total: int, fill: int) -> torch.Tensor:
    out = np.full(total, fill, dtype=np.int64)
    out[: values.shape[0]] = values
    return torch.from_numpy(out)


def _segments(runs: _Runs) -> Segments:
    length_S = np.zeros(len(runs.pool_sample), dtype=np.int64)
    np.add.at(length_S, runs.segment, runs.length)
    return Segments(tuple(length_S.tolist()), tuple(runs.prefix_length.tolist()))
