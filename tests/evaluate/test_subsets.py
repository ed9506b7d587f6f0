"""Scores of fused representations without some parts: equal to those of shards that lack these parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.evaluate import run
from tests.evaluate.test_evaluate import load_random, spoken
from tests.support import objectives, tiny_config, write_shards, write_tokenizer

PAIRS = {"scene-text": 1.0, "image-scene": 1.0}


def test_withheld_parts_are_scored_as_if_the_shards_lacked_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the held-out rows have no audio and are in no score of a set of parts."""
    write_tokenizer(tmp_path / "tokens.model")
    write_shards(tmp_path / "train", spoken(range(6, 8)))
    rows, places = spoken(range(6)), {}
    for name, lacking in {"all": (), "silent": ("audio",), "blind": ("image",)}.items():
        places[name] = str(write_shards(tmp_path / name, rows, lacking))
    other = str(write_shards(tmp_path / "other", spoken(range(8, 12)), ("audio",)))
    scene = {"kind": "latents", "parts": ["image", "audio"], "num_latents": 2, "missing": "bank"}
    wanted = {"language": ["en", "fr"]}
    config = tiny_config(
        tmp_path,
        representations={"scene": scene},
        objectives=objectives({"pairs": PAIRS}, None),
        moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1},
        evaluate={"rows": {"text-scene": wanted}, "by": {"scene": "audio_kind"}, "min_items": 1},
    )

    def scores(*test: str, subsets: bool = False) -> dict[str, dict[str, Any]]:
        settings = config.evaluate.model_copy(update={"subsets": subsets})
        load_random(monkeypatch, config, evaluate=settings)
        return {row["metric"]: row for row in run.evaluate(tmp_path, test, out=tmp_path).results}

    found = scores(places["all"], other, subsets=True)
    for name, shown in (("silent", "scene[image]"), ("blind", "scene[audio]"), ("all", "scene[image,audio]")):
        alone = scores(places[name])
        assert alone.keys() <= found.keys()
        for k in (1, 5, 10):
            for plain, its in ((f"speech_to_text_r{k}", f"{shown}_to_text_r{k}"),
                               (f"text_to_speech_r{k}", f"text_to_{shown}_r{k}")):  # fmt: skip
                assert found[its] == {**alone[plain], "metric": its}
    assert found["scene[audio]_to_image_r1"]["n"] == 12  # images are there for the other side
    assert found["scene[image]_to_text_r1"]["n"] == 6  # images, each in two languages


def test_scores_of_subsets_need_a_representation_whose_parts_may_be_missing() -> None:
    scene = {"kind": "late", "parts": ["image", "audio"]}
    with pytest.raises(ValueError, match=r"evaluate.subsets scores .* give one of them missing: allow, or set"):
        tiny_config(Path("unused"), representations={"scene": scene}, evaluate={"subsets": True})
