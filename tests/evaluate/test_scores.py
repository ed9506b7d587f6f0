"""Which rows make which score, on hand-made features."""

from dataclasses import replace

import numpy as np
import pytest

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.evaluate.features import Captions, HeldOut, same_text
from mmmoe_pretrain.evaluate.scores import (
    Score,
    caption_scores,
    image_text_rows,
    image_text_scores,
    speech_scores,
    zero_shot_scores,
)

NO_CAPTIONS = Captions(np.zeros(0), np.zeros(0, int), np.zeros(0, int), np.zeros(8, int))
SPEECH = SampleMeta("", audio_kind="speech")


def held_out(rows: list[tuple[SampleMeta, str, str, str]], captions: Captions = NO_CAPTIONS) -> HeldOut:
    """Rows of (meta, image, audio, text); the features are those of a perfect model of the text."""
    texts = [same_text(row[3]) for row in rows]
    axis = {text: i for i, text in enumerate(sorted(set(texts)))}
    features = np.eye(len(axis), dtype=np.float32)[[axis[text] for text in texts]]
    return HeldOut(
        metas=tuple(replace(row[0], key=f"k{i}") for i, row in enumerate(rows)),
        texts=tuple(texts),
        content={
            "image": tuple(r[1] for r in rows),
            "audio": tuple(r[2] for r in rows),
            "text": tuple(texts),
        },
        features={"image": features, "audio": features, "text": features},
        captions=captions,
        routing=(),
    )


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def test_image_text_scores_are_of_the_english_named_rows() -> None:
    named = SampleMeta("", subset="named", language="en")
    data = held_out(
        [
            (named, "i0", "", "cat"),
            (replace(named, language="fr"), "i0", "", "chat"),
            (replace(named, subset="spoken"), "i1", "", "dog"),
            (named, "i2", "", "owl"),
            (named, "", "a", "bee"),
        ]
    )
    rows, note = image_text_rows(data)
    assert (rows, note) == ([0, 3], "")
    score = by_name(image_text_scores(data, rows)[0])["image_to_text_r1"]
    assert (score.value, score.chance, score.n, score.candidates) == (1.0, 0.5, 2, 2)


def test_without_named_rows_each_group_counts_once_and_the_report_says_so() -> None:
    fish = SampleMeta("", group="fish", language="fr")
    data = held_out(
        [
            (fish, "i0", "", "poisson"),
            (replace(fish, language="en"), "i0", "", "fish"),
            (SPEECH, "i1", "", "sky"),
        ]
    )
    rows, note = image_text_rows(data)
    assert rows == [1, 2]
    assert "'named'" in note


def test_group_mates_that_look_and_read_differently_are_wrong_answers() -> None:
    duck = SampleMeta("", group="duck", subset="named")
    data = held_out([(duck, "i0", "", "duck"), (duck, "i1", "", "a duck"), (replace(duck, group="x"), "i2", "", "y")])
    score = by_name(image_text_scores(data, [0, 1, 2])[0])["image_to_text_r1"]
    assert score.chance == pytest.approx(1 / 3)


def test_one_picture_under_two_names_has_two_right_texts() -> None:
    duck = SampleMeta("", group="duck", subset="named")
    data = held_out([(duck, "i0", "", "duck"), (duck, "i0", "", "a duck"), (replace(duck, group="x"), "i1", "", "y")])
    score = by_name(image_text_scores(data, [0, 1, 2])[0])["image_to_text_r1"]
    assert (score.n, score.candidates) == (2, 3)
    assert score.chance == pytest.approx((2 / 3 + 1 / 3) / 2)


def speech(language: str, count: int) -> list[tuple[SampleMeta, str, str, str]]:
    meta = replace(SPEECH, language=language)
    return [(meta, "", f"{language}-{i}", f"{language} word {i}") for i in range(count)]


def test_speech_is_ranked_within_each_language_and_averaged() -> None:
    data = held_out(speech("fr", 20) + speech("ru", 40) + speech("ml", 3))
    scores, notes = speech_scores(data, "text", min_clips=20)
    named = by_name(scores)
    assert notes == []
    assert named["speech_to_text_r10"].chance == pytest.approx((10 / 20 + 10 / 40) / 2)
    assert named["speech_to_text_r10"].n == 60
    assert named["speech_to_text_r10"].candidates == 40
    assert named["text_to_speech_r10/fr"].chance == pytest.approx(0.5)
    assert named["speech_to_text_r10/ru"].n == 40
    assert "speech_to_text_r10/ml" not in named
    assert named["speech_to_text_r1"].value == 1.0


def test_a_sentence_said_twice_has_two_right_clips_and_one_text() -> None:
    rows = [*speech("fr", 4), (replace(SPEECH, language="fr"), "", "fr-again", "FR  word 0")]
    named = by_name(speech_scores(held_out(rows), "text", min_clips=1)[0])
    assert named["speech_to_text_r1"].candidates == 4
    assert named["speech_to_text_r1"].n == 5
    assert named["text_to_speech_r1"].n == 4
    assert named["text_to_speech_r1"].chance == pytest.approx((2 / 5 + 3 * 1 / 5) / 4)


def test_too_few_clips_fall_back_to_the_largest_language_in_the_open() -> None:
    scores, notes = speech_scores(held_out(speech("fr", 4) + speech("ru", 6)), "text", min_clips=50)
    assert "speech_to_text_r10/ru" in by_name(scores)
    assert "speech_to_text_r10/fr" not in by_name(scores)
    assert "50" in notes[0]
    assert "ru (6 clips)" in notes[0]


def test_sound_effects_are_not_speech() -> None:
    effect = replace(SPEECH, audio_kind="effect")
    scores, notes = speech_scores(held_out([(effect, "i", "a", "bark")]), "image", min_clips=1)
    assert scores == []
    assert "left out" in notes[0]


def test_image_speech_takes_any_clip_that_says_the_text() -> None:
    meta = replace(SPEECH, language="fr")
    rows = [(meta, "i0", "a0", "chat"), (meta, "i1", "a1", "chat"), (meta, "i2", "a2", "hibou")]
    named = by_name(speech_scores(held_out(rows), "image", min_clips=1)[0])
    assert named["image_to_speech_r1"].chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert named["speech_to_image_r1"].value == 1.0


def test_zero_shot_counts_each_picture_once() -> None:
    labels = ["animal", "animal", "plant", "animal", ""]
    rows = [
        (replace(SPEECH, label=lab), f"i{min(i, 3)}", "", t)
        for i, (lab, t) in enumerate(zip(labels, "abcde", strict=True))
    ]
    rows[1] = (rows[1][0], "i0", "", "b")
    data = held_out(rows)
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(5)[[0, 2]]  # as image a; as image c

    named = by_name(zero_shot_scores(data, range(5), encode, "a picture of {}")[0])
    assert asked == ["a picture of animal", "a picture of plant"]
    # Pictures a, c right; picture d is orthogonal to both classes: half a point.
    assert named["zero_shot_accuracy"].n == 3
    assert named["zero_shot_accuracy"].value == pytest.approx(2.5 / 3)
    assert named["zero_shot_accuracy"].majority == pytest.approx(2 / 3)
    assert named["zero_shot_balanced"].value == pytest.approx((1.5 / 2 + 1) / 2)
    assert named["zero_shot_balanced"].majority == 0.5


def test_captions_are_scored_together_and_by_prefix() -> None:
    captions = Captions(
        nll_G=np.array([2 * np.log(2), 2 * np.log(8)]),
        tokens_G=np.array([2, 2]),
        prefix_G=np.array([0, 1]),
        targets_V=np.array([3, 1, 0, 0]),
    )
    scores, _ = caption_scores(held_out([(SPEECH, "i", "a", "t")], captions), np.array([0, 0, 0, 0]))
    named = by_name(scores)
    assert named["caption_perplexity"].value == pytest.approx(4)
    assert named["caption_perplexity/image"].value == pytest.approx(2)
    assert named["caption_perplexity/audio"].value == pytest.approx(8)
    assert named["caption_perplexity"].chance == 4
    assert named["caption_perplexity"].majority == pytest.approx(4)
    assert named["caption_perplexity"].n == 4
