"""The layout of a microbatch, against one written out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import IGNORE, MODALITIES, Batch, Sample, SampleMeta
from mmmoe_pretrain.config import AudioConfig, CaptioningConfig, ImageConfig, ModalitiesConfig, TextConfig
from mmmoe_pretrain.data.pack import PackSettings, max_tokens_per_sample, pack

MODALITIES_CONFIG = ModalitiesConfig(
    image=ImageConfig(size=8, patch=4),  # 4 tokens
    audio=AudioConfig(n_mels=8, patch=2, max_seconds=0.1),
    text=TextConfig(max_tokens=6),
)
ALL = CaptioningConfig(weight=1.0, prefixes=("image",), fraction=1.0)
SETTINGS = PackSettings(MODALITIES_CONFIG, bos_id=1, eos_id=2, captioning=ALL, seed=0)
PLAIN = dataclasses.replace(SETTINGS, captioning=None)


def sample(key: str, image: bool = False, frames: int = 0, text: tuple[int, ...] = ()) -> Sample:
    return Sample(
        SampleMeta(key),
        image=np.full((3, 8, 8), ord(key[0]), np.uint8) if image else None,
        audio=np.full((8, frames), ord(key[0]), np.float32) if frames else None,
        text=np.asarray(text, dtype=np.int64) if text else None,
    )


# a: image and the text 5 6; b: 3 frames (2 tokens) and the text 7; c: bad, so empty; d: image, 4 frames.
SAMPLES = [
    sample("a", image=True, text=(5, 6)),
    sample("b", frames=3, text=(7,)),
    sample("c"),
    sample("d", image=True, frames=4),
]
IMG, AUD, T = range(3)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return pack(SAMPLES, SETTINGS)


def test_the_stream_is_laid_out_as_documented(batch: Batch) -> None:
    #        a image  a text   b audio b text  d image  d audio  fused: a image, text
    runs = [(IMG, 4), (T, 4), (AUD, 2), (T, 3), (IMG, 4), (AUD, 2), (IMG, 4), (T, 3)]
    modality = [m for m, n in runs for _ in range(n)]
    assert batch.num_tokens == 64
    assert batch.valid.tolist() == [True] * 26 + [False] * 38
    assert batch.modality_ids.tolist() == modality + [0] * 38
    segments = [0] * 4 + [1] * 4 + [2] * 2 + [3] * 3 + [4] * 4 + [5] * 2 + [6] * 7
    assert batch.segment_ids.tolist() == segments + [-1] * 38
    assert batch.positions.tolist() == [i for _, n in runs for i in range(n)] + [0] * 38
    for m in range(3):
        assert batch.rows[m].tolist() == [row for row, is_m in enumerate(modality) if is_m == m]


def test_rows_point_at_their_embeddings(batch: Batch) -> None:
    assert batch.source[IMG].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]  # the fused prefix is a's again
    assert batch.source[AUD].tolist() == [0, 1, 2, 3]  # both clips are padded to 4 frames, 2 tokens
    assert batch.source[T].tolist() == list(range(10))
    assert batch.text_ids.tolist() == [1, 5, 6, 2, 1, 7, 2, 1, 5, 6]


def test_a_caption_predicts_its_next_token(batch: Batch) -> None:
    # the last run: inputs begin 5 6 at rows 23 to 25, targets 5 6 end
    assert batch.targets.tolist() == [IGNORE] * 23 + [5, 6, 2] + [IGNORE] * 38


def test_raw_inputs_are_stacked_and_padded(batch: Batch) -> None:
    assert batch.images[:, 0, 0, 0].tolist() == [ord("a"), ord("d")]
    assert batch.audio.shape == (2, 8, 4)
    assert batch.audio_frames.tolist() == [3, 4]


def test_segments_know_what_to_pool(batch: Batch) -> None:
    assert batch.pool_sample.tolist() == [0, 0, 1, 1, 3, 3, -1]
    assert batch.pool_modality.tolist() == [IMG, T, AUD, T, IMG, AUD, -1]
    assert batch.present_MB.tolist() == [
        [True, False, False, True],
        [False, True, False, True],
        [True, True, False, False],
    ]
    assert [meta.key for meta in batch.metas] == ["a", "b", "c", "d"]


def test_segments_have_the_lengths_of_their_runs(batch: Batch) -> None:
    assert batch.segments.lengths == (4, 4, 2, 3, 4, 2, 7)
    assert batch.segments.prefixes == (0, 0, 0, 0, 0, 0, 4)  # a's image, in front of a's text


@pytest.mark.parametrize("samples", [[], [sample("c")], [sample("a", image=True)], [sample("b", frames=5)]])
def test_absent_modalities_have_zero_rows(samples: list[Sample]) -> None:
    packed = pack(samples, SETTINGS)
    assert packed.num_tokens == 64
    assert packed.present_MB.shape == (3, len(samples))
    assert packed.group_ids.shape == (len(samples),)
    for m, name in enumerate(MODALITIES):
        count = sum(s.has(name) for s in samples)
        assert (packed.rows[m].numel() > 0) == (count > 0)
    assert packed.images.shape[1:] == (3, 8, 8)
    assert packed.audio.shape[1] == 8
    assert packed.audio.shape[2] % 2 == 0
    assert packed.text_ids.dtype == torch.int64


def test_a_fixed_budget_is_kept_or_refused() -> None:
    assert pack(SAMPLES, SETTINGS, tokens=30).num_tokens == 30
    with pytest.raises(ValueError, match=r"4 samples take 26 tokens, but the budget is 25; raise it to at least 26"):
        pack(SAMPLES, SETTINGS, tokens=25)


def test_the_longest_sample_fits_its_stated_bound() -> None:
    longest = sample("x", image=True, frames=MODALITIES_CONFIG.audio.max_frames, text=(5,) * 6)
    for prefixes in (("image",), ("audio",)):
        captioning = CaptioningConfig(weight=1, prefixes=prefixes, fraction=1)
        settings = dataclasses.replace(SETTINGS, captioning=captioning)
        used = int(pack([longest], settings).valid.sum())
        assert used == max_tokens_per_sample(settings)


def test_samples_of_one_group_share_an_id_and_others_do_not() -> None:
    metas = [SampleMeta("k0", group="g"), SampleMeta("k1", group="g"), SampleMeta("g"), SampleMeta("k3")]
    ids = pack([Sample(meta, text=np.array([5])) for meta in metas], PLAIN).group_ids.tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3  # a key that equals a group's name is still another group


def test_captions_are_drawn_by_position_at_the_fraction() -> None:
    captioning = CaptioningConfig(weight=1, prefixes=("image", "audio"), fraction=0.25)
    settings = dataclasses.replace(SETTINGS, captioning=captioning)
    samples = [sample("a", image=True, frames=4, text=(5,))] * 400

    def prefixes(positions: range) -> list[int]:
        packed = pack(samples[: len(positions)], settings, positions)
        fused = torch.nonzero(packed.pool_sample < 0)[:, 0].tolist()
        first = [int(torch.nonzero(packed.segment_ids == s)[0, 0]) for s in fused]
        return packed.modality_ids[first].tolist()

    drawn = prefixes(range(400))
    assert 65 < len(drawn) < 135  # 100, within four standard deviations
    assert 0.25 < np.mean([m == IMG for m in drawn]) < 0.75
    assert prefixes(range(200)) + prefixes(range(200, 400)) == drawn  # cut anywhere, drawn the same


def test_no_caption_without_a_text_or_a_prefix() -> None:
    samples = [sample("a", image=True), sample("b", text=(5,)), sample("d", frames=4, text=(5,))]
    assert (pack(samples, SETTINGS).pool_sample >= 0).all()  # d has audio, and only images are prefixes
