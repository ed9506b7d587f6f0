"""The layout of a microbatch, against one written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Batch, Item, Part, Sample, SampleMeta, Segment, Spans
from mmmoe_pretrain.data.pack import PackSettings, attention_blocks, pack
from tests.support import pack_settings, tiny_config

MODALITIES = {
    "image": {"kind": "image", "size": 8, "patch": 4},  # 4 tokens
    "audio": {"kind": "audio", "n_mels": 8, "patch": 2, "max_seconds": 0.1},
    "text": {"kind": "text", "max_tokens": 6},
}
PAIRS = {"kind": "contrastive", "pairs": {"image-text": 1.0, "image-audio": 1.0}}
CAPTIONS = {"kind": "next_token", "parts": ["image", "text"]}


def settings_of(modalities: dict[str, Any] = MODALITIES, **sections: Any) -> PackSettings:
    return pack_settings(tiny_config(Path("unused"), modalities=modalities, **sections))


SETTINGS = settings_of(objectives={"pairs": PAIRS, "captions": CAPTIONS})


def items(key: str, image: bool = False, frames: int = 0, text: tuple[int, ...] = ()) -> list[Item]:
    found = []
    if image:
        found.append(Item("image", np.full((3, 8, 8), ord(key[0]), np.uint8)))
    if frames:
        found.append(Item("audio", np.full((8, frames), ord(key[0]), np.float32)))
    if text:
        found.append(Item("text", np.asarray([1, *text, 2])))
    return found


def sample(key: str, image: bool = False, frames: int = 0, text: tuple[int, ...] = ()) -> Sample:
    return Sample(SampleMeta(key), tuple(items(key, image, frames, text)))


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
    assert batch.num_valid == 26
    assert batch.valid.tolist() == [True] * 26 + [False] * 38
    assert batch.modality_ids.tolist() == modality + [0] * 38
    segments = [0] * 4 + [1] * 4 + [2] * 2 + [3] * 3 + [4] * 4 + [5] * 2 + [6] * 7
    assert batch.segment_ids.tolist() == segments + [-1] * 38
    assert batch.positions.tolist() == [i for _, n in runs for i in range(n)] + [0] * 38
    assert batch.task_ids.tolist() == [0] * 6 + [1]
    for m, name in enumerate(MODALITIES):
        assert batch.rows[name].tolist() == [row for row, its in enumerate(modality) if its == m]


def test_rows_point_at_their_embeddings_whose_inputs_are_stacked_and_padded(batch: Batch) -> None:
    assert batch.source["image"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]  # the fused prefix is a's again
    assert batch.source["audio"].tolist() == [0, 1, 3, 4]  # clips of 2 tokens, with a token between them
    assert batch.inputs["text"]["ids"].tolist() == [1, 5, 6, 2, 1, 7, 2]  # the fused text is a's again
    assert batch.source["text"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert batch.inputs["image"]["pixels"][:, 0, 0, 0].tolist() == [ord("a"), ord("d")]
    assert batch.inputs["audio"]["log_mel"].shape == (1, 8, 10)
    assert batch.inputs["audio"]["frames_valid"].tolist() == [3, 4]
    assert batch.inputs["text"]["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_a_token_is_known_by_its_id_or_its_number(batch: Batch) -> None:
    keys = [0, 1, 2, 3, 1, 5, 6, 2, 0, 1, 1, 7, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 1, 5, 6]
    assert batch.keys[:26].tolist() == keys


def test_a_caption_predicts_its_next_token(batch: Batch) -> None:
    # the last run: inputs begin 5 6 at rows 23 to 25, targets 5 6 end
    assert list(batch.targets) == ["captions"]
    assert batch.targets["captions"].rows.tolist() == [23, 24, 25]
    assert batch.targets["captions"].ids.tolist() == [5, 6, 2]


def test_samples_have_their_pooled_segments_and_attention_blocks_the_lengths_of_segments(batch: Batch) -> None:
    pooled = {name: segment_B.tolist() for name, segment_B in batch.pooled.items()}
    assert pooled == {"image": [0, -1, -1, 4], "audio": [-1, 2, -1, 5], "text": [1, 3, -1, -1]}
    assert [meta.key for meta in batch.metas] == ["a", "b", "c", "d"]
    assert batch.attention.lengths == (4, 4, 2, 3, 4, 2, 7)
    assert batch.attention.full == (4, 4, 2, 3, 4, 2, 4)  # last: a's image, in front of a's text


def test_a_run_of_captions_alone_packs_and_embeds_nothing_else() -> None:
    packed = pack(SAMPLES, settings_of(objectives={"captions": CAPTIONS}))
    assert packed.attention.lengths == (7,) and packed.attention.full == (4,)
    assert packed.pooled == {}
    assert packed.inputs["image"]["pixels"].shape[0] == 1, "d's image is in no segment"
    assert packed.inputs["audio"]["log_mel"].shape[0] == 0
    assert packed.inputs["text"]["ids"].tolist() == [1, 5, 6, 2]


def test_what_two_objectives_pool_is_packed_once() -> None:
    objectives = {"near": {**PAIRS, "pairs": {"image-text": 1.0}}, "far": {**PAIRS, "pairs": {"text-audio": 1.0}}}
    packed = pack(SAMPLES, settings_of(objectives=objectives))
    # near: a image, a text, b text, d image; then far, which shares the texts: b audio, d audio
    assert packed.attention.lengths == (4, 4, 3, 4, 2, 2)
    assert packed.task_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert packed.pooled["text"].tolist() == [1, 2, -1, -1]
    assert packed.pooled["audio"].tolist() == [-1, 4, -1, 5]


def test_modalities_are_pooled_together_where_a_representation_names_them() -> None:
    pairs = {"kind": "contrastive", "pairs": {"scene-text": 1.0}}
    packed = pack(
        [*SAMPLES, sample("e", image=True, frames=2, text=(5,))],
        settings_of(objectives={"pairs": pairs}, representations={"scene": ["audio", "image"], "unused": ["image"]}),
    )
    # a text, b text, d scene (2 tokens of audio, then 4 of the image), e text, e scene
    assert packed.attention.lengths == packed.attention.full == (4, 3, 6, 3, 5)
    assert list(packed.pooled) == ["text", "scene"]
    assert packed.pooled["scene"].tolist() == [-1, -1, -1, 2, 4], "a and b lack one of the two"
    start = packed.segment_ids.tolist().index(2)
    assert packed.modality_ids[start : start + 6].tolist() == [AUD] * 2 + [IMG] * 4
    assert packed.positions[start : start + 6].tolist() == [0, 1, 0, 1, 2, 3]


def fused(*parts: str, missing: str = "skip", kind: str = "late") -> dict[str, Any]:
    return {"kind": kind, "parts": list(parts), "missing": missing}


def test_parts_of_fused_representations_are_segments_of_their_own_and_packed_once() -> None:
    both, any_of = fused("image", "audio"), fused("audio", "image", missing="allow", kind="latents")
    packed = pack(
        SAMPLES,
        settings_of(
            objectives={"pairs": {"kind": "contrastive", "pairs": {"both-any_of": 1.0, "image-any_of": 1.0}}},
            representations={"both": both, "any_of": any_of},
        ),
    )
    # a image; b audio; d image, d audio (the order of the first representation that asks)
    assert packed.attention.lengths == packed.attention.full == (4, 2, 4, 2)
    pooled = {name: segment_B.tolist() for name, segment_B in packed.pooled.items()}
    assert pooled == {"image": [0, -1, -1, 2], "audio": [-1, 1, -1, 3], "both": [-1, -1, -1, 2],
                      "any_of": [0, 1, -1, 3]}  # fmt: skip
    assert list(packed.pooled) == ["image", "audio", "both", "any_of"]
    # Rows of the tokens, for the kind that reads them: 4 + 2 + 4 + 2.
    assert packed.spans == {"audio": Spans((0, 4, 0, 10), (0, 2, 0, 2)), "image": Spans((0, 0, 0, 6), (4, 0, 0, 4))}


def test_early_fusion_of_what_there_is_where_parts_may_be_missing() -> None:
    scene = fused("image", "audio", missing="allow", kind="early")
    packed = pack(
        SAMPLES,
        settings_of(objectives={"pairs": {**PAIRS, "pairs": {"scene-text": 1.0}}}, representations={"scene": scene}),
    )
    # a text, a scene (image), b text, b scene (audio), d scene (both)
    assert packed.attention.lengths == (4, 4, 3, 2, 6)
    assert packed.pooled["scene"].tolist() == [1, 3, -1, 4] and not packed.spans


def test_tokens_know_the_combination_of_modalities_of_their_sample_where_a_loss_asks() -> None:
    """Samples have image and text, audio and text, nothing, and image and audio; combinations are of image and audio,
    and texts take no part."""
    objectives = {"pairs": {**PAIRS, "pairs": {"image-text": 1.0, "audio-text": 1.0}}}
    losses = {"combination": 0.1, "combination_modalities": ["image", "audio"]}
    assert pack(SAMPLES, settings_of(objectives=objectives)).combination_ids is None
    packed = pack(SAMPLES, settings_of(objectives=objectives, moe={"losses": losses}))
    assert packed.combination_ids is not None
    # a image, a text, b audio, b text, d image, d audio; padding
    found = packed.combination_ids.tolist()
    assert found[: packed.num_valid] == [0] * 4 + [-1] * 4 + [1] * 2 + [-1] * 3 + [-1] * 6
    assert set(found[packed.num_valid :]) == {-1}


def test_a_sample_is_fused_only_if_all_that_it_has_of_the_parts_is_packed() -> None:
    """One objective asks for images alone, and none for the audio of d: its clip would count as absent."""
    settings = settings_of(
        objectives={"pairs": {"kind": "contrastive", "pairs": {"any_of-text": 1.0, "image-text": 1.0}}},
        representations={"any_of": fused("image", "audio", missing="allow")},
    )
    asked = settings.objectives["pairs"].segments

    def without_audio(of: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        yield from (segment for segment in asked(of, rng) if segment.representation != "audio")

    settings.objectives["pairs"].segments = without_audio  # type: ignore[method-assign]
    assert pack(SAMPLES, settings).pooled["any_of"].tolist() == [0, -1, -1, -1]


def page(*parts: list[Item], silent: tuple[int, ...] = ()) -> Sample:
    flat = [item for part in parts for item in part]
    items = tuple(Item(item.modality, item.value, loss=i not in silent) for i, item in enumerate(flat))
    return Sample(SampleMeta("page"), items, document=True)


def test_a_document_is_one_segment_in_the_order_of_its_items() -> None:
    reading = settings_of(objectives={"reading": {"kind": "next_token"}})
    a_page = page(items("a", image=True), items("b", text=(5, 6)), items("c", frames=4), items("d", text=(7,)),
                  silent=(3,))  # fmt: skip
    packed = pack([a_page, sample("e", image=True, text=(8,))], reading)
    # image 4, begin 5 6, audio 2, begin 7; and of a sample that is not a document its text alone: begin 8
    assert packed.attention.lengths == (11, 2)
    assert packed.attention.full == (4, 0), "an image behind a text sees what stands before it alone"
    runs = [(IMG, 4), (T, 3), (AUD, 2), (T, 2), (T, 2)]
    assert packed.modality_ids[:13].tolist() == [m for m, n in runs for _ in range(n)]
    assert packed.positions[:13].tolist() == [*range(11), 0, 1]
    assert packed.targets["reading"].rows.tolist() == [4, 5, 6, 11, 12]
    assert packed.targets["reading"].ids.tolist() == [5, 6, 2, 8, 2]
    assert packed.inputs["image"]["pixels"].shape[0] == 1


def test_parts_that_attend_alone_are_blocks_of_their_own() -> None:
    alone = Segment("x", (Part(0, 0, 4, "alone"), Part(1, 0, 2, "alone")))
    assert attention_blocks(alone) == [(4, 4), (2, 2)]
    prefix = Segment("x", (Part(0, 0, 4), Part(1, 0, 2), Part(2, 0, 3, "causal"), Part(0, 2, 4, "causal")))
    assert attention_blocks(prefix) == [(11, 6)]
    with pytest.raises(ValueError, match="alone and others in one segment"):
        attention_blocks(Segment("x", (Part(0, 0, 4, "alone"), Part(1, 0, 2))))
    with pytest.raises(AssertionError, match="full part stands after a causal one"):
        Segment("x", (Part(0, 0, 4, "causal"), Part(1, 0, 2)))


@pytest.mark.parametrize("samples", [[], [sample("c")], [sample("a", image=True)], [sample("b", frames=5)]])
def test_absent_modalities_have_zero_rows(samples: list[Sample]) -> None:
    packed = pack(samples, SETTINGS)
    assert packed.num_tokens == 64
    assert packed.group_ids.shape == (len(samples),)
    for name in MODALITIES:
        assert packed.pooled[name].shape == (len(samples),)
        count = sum(s.first(name) is not None for s in samples)
        assert (packed.rows[name].numel() > 0) == (count > 0)
    assert packed.inputs["image"]["pixels"].shape[1:] == (3, 8, 8)
    assert packed.inputs["audio"]["log_mel"].shape[1] == 8
    assert packed.inputs["audio"]["log_mel"].shape[2] % 2 == 0
    assert packed.inputs["text"]["ids"].dtype == torch.int64
    assert len(packed.targets["captions"]) == 0


def test_samples_of_one_group_share_an_id_and_others_do_not() -> None:
    metas = [SampleMeta("k0", group="g"), SampleMeta("k1", group="g"), SampleMeta("g"), SampleMeta("k3")]
    ids = pack([Sample(meta, tuple(items("a", text=(5,)))) for meta in metas], SETTINGS).group_ids.tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3  # a key that equals a group's name is still another group


def first_modalities(settings: PackSettings, task: int, samples: list[Sample], positions: range) -> list[int]:
    """Of each segment of ``task``, the modality of its first token."""
    packed = pack(samples, settings, positions)
    of_task = torch.nonzero(packed.task_ids == task)[:, 0].tolist()
    return [int(packed.modality_ids[int(torch.nonzero(packed.segment_ids == s)[0, 0])]) for s in of_task]


def test_captions_are_drawn_by_position_at_the_fraction() -> None:
    captions = {**CAPTIONS, "parts": [["image", "audio"], "text"], "fraction": 0.25}
    settings = settings_of(objectives={"pairs": PAIRS, "captions": captions})
    samples = [sample("a", image=True, frames=4, text=(5,))] * 400
    drawn = first_modalities(settings, 1, samples, range(400))
    assert 65 < len(drawn) < 135  # 100, within four standard deviations
    assert 0.25 < np.mean([m == IMG for m in drawn]) < 0.75
    halves = [first_modalities(settings, 1, samples[:200], places) for places in (range(200), range(200, 400))]
    assert halves[0] + halves[1] == drawn  # cut anywhere, drawn the same
    # Another name, and another objective before it, change no draw; a second of the kind draws its own.
    beside = {"named": captions, "again": captions}
    other = settings_of(objectives=beside)
    assert first_modalities(other, 0, samples, range(400)) == drawn
    second = first_modalities(other, 1, samples, range(400))
    assert second != drawn
    without = settings_of(objectives={**beside, "named": {**captions, "weight": 0.0}})
    assert first_modalities(without, 0, samples, range(400)) == second, "a weight of 0 changes no draw of another"


def test_no_caption_without_a_text_or_a_prefix() -> None:
    samples = [sample("a", image=True), sample("b", text=(5,)), sample("d", frames=4, text=(5,))]
    packed = pack(samples, SETTINGS)
    assert (packed.task_ids == 0).all()  # d has audio, and only images are prefixes
    assert len(packed.targets["captions"]) == 0
