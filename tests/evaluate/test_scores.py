"""Which rows make which score, on hand-made features."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate.features import HeldOut, Predicted, same_text
from mmmoe_pretrain.evaluate.scores import Score, perplexity_scores, retrieval_scores, zero_shot_scores
from mmmoe_pretrain.objectives import objectives_of
from tests.support import tiny_config

SPEECH = SampleMeta("", tags={"audio_kind": "speech"})
IMAGE_TEXT, AUDIO_TEXT, IMAGE_AUDIO = ("image", "text"), ("audio", "text"), ("image", "audio")


def settings(least: int = 1, **more: Any) -> EvaluateConfig:
    """As the demo is scored."""
    return EvaluateConfig(**{"by": {"audio": "audio_kind"}, "within": "language", "min_items": least, **more})


def held_out(rows: list[tuple[SampleMeta, str, str, str]]) -> HeldOut:
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
        predicted={},
        routing=(),
    )


def retrieved(data: HeldOut, pair: tuple[str, str] = IMAGE_TEXT, least: int = 1, **more: Any) -> dict[str, Score]:
    return by_name(retrieval_scores(data, pair, settings(least, **more))[0])


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def test_image_scores_are_of_the_rows_that_the_config_names() -> None:
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
    wanted = {"subset": ("named", "other"), "language": ("en",)}
    score = retrieved(data, rows={"text-image": wanted})["image_to_text_r1"]
    assert (score.value, score.chance, score.n, score.candidates) == (1.0, 0.5, 2, 2)
    assert retrieved(data, rows={"image-audio": wanted}, within="")["image_to_text_r1"].n == 3


def test_ranking_is_within_each_language_and_averaged() -> None:
    """Of 20 German rows and 40 without a language a random order finds 10 / 20 and 10 / 40; 3 Malay ones are too
    few."""
    rows = [(SampleMeta("", language="de"), f"i{i}", "", f"Wort {i}") for i in range(20)]
    rows += [(SampleMeta(""), f"i{i}", "", f"word {i}") for i in range(40)]
    rows += [(SampleMeta("", language="ml"), f"i{i}", "", f"kata {i}") for i in range(3)]
    scores, notes = retrieval_scores(held_out(rows), IMAGE_TEXT, settings(20))
    named = by_name(scores)
    assert notes == []
    both = named["image_to_text_r10"]
    assert both.chance == pytest.approx((10 / 20 + 10 / 40) / 2)
    assert (both.n, both.candidates, both.value) == (60, 40, 1.0)
    assert named["text_to_image_r10/de"].chance == pytest.approx(0.5)
    assert named["image_to_text_r10/unknown"].n == 40
    assert "image_to_text_r10/ml" not in named
    (everything,) = {score.n for name, score in retrieved(held_out(rows), within="").items() if "image_to" in name}
    assert everything == 40, "20 images are in both languages, as one item"
    scores, (note,) = retrieval_scores(held_out(rows), IMAGE_TEXT, settings(41))
    assert "41" in note and "of unknown (40 items)" in note and "evaluate.min_items" in note
    assert by_name(scores)["image_to_text_r10"].n == 40
    assert not any("/" in score.metric for score in scores), "there is one language"


DUCK = SampleMeta("", group="duck", subset="named")
OTHER = replace(DUCK, group="x")
FRENCH = replace(SPEECH, language="fr")


@pytest.mark.parametrize(
    ("pair", "rows", "metric", "n", "candidates", "chance"),
    [  # images of one group with other names are wrong answers
        (IMAGE_TEXT, [(DUCK, "i0", "", "duck"), (DUCK, "i1", "", "a duck"), (OTHER, "i2", "", "y")],
         "image_to_text", 3, 3, 1 / 3),
        # one image under two names has two right texts
        (IMAGE_TEXT, [(DUCK, "i0", "", "duck"), (DUCK, "i0", "", "a duck"), (OTHER, "i1", "", "y")],
         "image_to_text", 2, 3, (2 / 3 + 1 / 3) / 2),
        # a sentence that is spoken twice has two right clips, and is one text
        (AUDIO_TEXT, [(FRENCH, "", "a0", "chat"), (FRENCH, "", "a1", "CHAT"), (FRENCH, "", "a2", "ours")],
         "text_to_speech", 2, 3, (2 / 3 + 1 / 3) / 2),
        # an image may be found by any clip of its text
        (IMAGE_AUDIO, [(FRENCH, "i0", "a0", "chat"), (FRENCH, "i1", "a1", "chat"), (FRENCH, "i2", "a2", "ours")],
         "image_to_speech", 3, 3, (2 / 3 + 2 / 3 + 1 / 3) / 3),
    ],
)  # fmt: skip
def test_right_answers_are_what_some_row_pairs_with_the_query_or_its_text(
    pair: tuple[str, str], rows: list[Any], metric: str, n: int, candidates: int, chance: float
) -> None:
    score = retrieved(held_out(rows), pair)[f"{metric}_r1"]
    assert (score.n, score.candidates) == (n, candidates)
    assert score.chance == pytest.approx(chance)


@pytest.mark.parametrize(
    ("kind", "name"), [("effect", "effect"), ("Sea birds/gulls", "sea_birds_gulls"), ("", "audio"), ("text", "audio")]
)
def test_audio_that_is_no_speech_is_scored_under_the_kind_that_its_rows_give(kind: str, name: str) -> None:
    """Beside 2 spoken clips, which are not candidates of its own 4."""
    rows = [
        (SampleMeta("", tags={"audio_kind": kind}, language="en"), f"i{i}", f"bark {i}", f"dog {i}") for i in range(4)
    ]
    rows += [(replace(SPEECH, language="en"), f"j{i}", f"word {i}", f"word {i}") for i in range(2)]
    for other, pair in (("text", AUDIO_TEXT), ("image", IMAGE_AUDIO)):
        named = retrieved(held_out(rows), pair)
        assert named[f"{name}_to_{other}_r1"].chance == named[f"{other}_to_{name}_r1"].chance == 1 / 4
        assert named[f"speech_to_{other}_r1"].chance == 1 / 2
        assert named[f"{name}_to_{other}_r1"].value == 1.0


def test_each_pair_is_scored_once_whatever_objectives_align_it(tmp_path: Path) -> None:
    pairs = [{"image-text": 1.0, "image-audio": 0.5}, {"text-image": 1.0, "audio-text": 0.0}]
    sections = {f"pairs_{i}": {"kind": "contrastive", "pairs": its} for i, its in enumerate(pairs)}
    found = objectives_of(tiny_config(tmp_path, objectives=sections)).aligned
    assert found == (("image", "text"), ("image", "audio"), ("audio", "text"))


def test_pairs_that_no_row_has_get_no_score() -> None:
    scores, notes = retrieval_scores(held_out([(SPEECH, "i", "", "bark")]), AUDIO_TEXT, settings())
    assert scores == []
    assert notes == ["no held-out row has both audio and text: no score of them"]


def test_zero_shot_counts_each_image_once() -> None:
    labels = ["animal", "animal", "plant", "animal", ""]
    rows = [
        (replace(SPEECH, label=lab), f"i{min(i, 3)}", "", t)
        for i, (lab, t) in enumerate(zip(labels, "abcde", strict=True))
    ]
    rows[1] = (rows[1][0], "i0", "", "b")
    rows.append((replace(SPEECH, label="sound"), "", "clip", "f"))
    data = held_out(rows)
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(6)[[0, 2]]  # as image a; as image c

    named = by_name(zero_shot_scores(data, IMAGE_TEXT, encode, settings(prompt="an image of {}"))[0])
    assert asked == ["an image of animal", "an image of plant"]
    # Images a, c right; image d is orthogonal to both classes: half a point.
    assert named["image_to_text_zero_shot"].n == 3
    assert named["image_to_text_zero_shot"].value == pytest.approx(2.5 / 3)
    assert named["image_to_text_zero_shot"].majority == pytest.approx(2 / 3)
    assert named["image_to_text_zero_shot_balanced"].value == pytest.approx((1.5 / 2 + 1) / 2)
    assert named["image_to_text_zero_shot_balanced"].majority == 0.5


def test_classes_of_audio_are_distinguished_from_the_texts_of_its_own_part() -> None:
    rows = [(replace(SPEECH, label=label), "", f"a{i}", label) for i, label in enumerate(["cat", "dog", "dog"])]
    rows += [(SampleMeta("", label="rain", tags={"audio_kind": "effect"}), "", "a3", "rain")]
    data = held_out(rows)

    def encode(texts: list[str]) -> np.ndarray:
        return data.features["text"][[data.texts.index(text) for text in texts]]

    scores, notes = zero_shot_scores(data, AUDIO_TEXT, encode, settings())
    assert notes == ["all labelled held-out rows with effect are 'rain': no zero-shot score of it"]
    named = by_name(scores)
    assert (named["speech_to_text_zero_shot"].value, named["speech_to_text_zero_shot"].candidates) == (1.0, 2)


def test_targets_are_scored_together_and_by_what_their_segments_begin_with() -> None:
    found = Predicted(
        nll_G=np.array([2 * np.log(2), 2 * np.log(8)]),
        tokens_G=np.array([2, 2]),
        first_G=np.array([0, 1]),
        targets_V=np.array([3, 1, 0, 0]),
    )
    named = by_name(perplexity_scores("captions", found, np.array([0, 0, 0, 0]), ("image", "audio", "text")))
    assert named["captions_perplexity"].value == pytest.approx(4)
    assert named["captions_perplexity/image"].value == pytest.approx(2)
    assert named["captions_perplexity/audio"].value == pytest.approx(8)
    assert named["captions_perplexity"].chance == 4
    assert named["captions_perplexity"].majority == pytest.approx(4)
    assert named["captions_perplexity"].n == 4


def test_languages_weigh_the_same_in_the_balanced_perplexity() -> None:
    """Three German targets of 2 ** 1 and one Dutch of 2 ** 5; Danish has too few segments."""
    found = Predicted(
        nll_G=np.log(2) * np.array([1.0, 2.0, 5.0, 0.0, 9.0]),
        tokens_G=np.array([1, 2, 1, 0, 1]),
        first_G=np.zeros(5, dtype=int),
        targets_V=np.array([5, 0]),
        metas_G=tuple(SampleMeta(f"{i}", language=its) for i, its in enumerate(["de", "de", "nl", "nl", "da"])),
    )
    of = EvaluateConfig(within="language", min_items=2)
    named = by_name(perplexity_scores("captions", found, None, ("text",), of))
    assert {metric: score.value for metric, score in named.items()} == pytest.approx({
        "captions_perplexity": 2 ** (17 / 5), "captions_perplexity/de": 2, "captions_perplexity/nl": 32,
        "captions_perplexity_balanced": 2**3,
    })  # fmt: skip
    assert named["captions_perplexity_balanced"].n == 4
    alone = by_name(perplexity_scores("captions", found, None, ("text",), of.model_copy(update={"min_items": 3})))
    assert alone.keys() == {"captions_perplexity"}
