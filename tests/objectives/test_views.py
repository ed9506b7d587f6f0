"""Representations that are a view of a modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.modalities import transforms
from mmmoe_pretrain.models.mmmoe import MMMoE
from tests.support import pack_settings, tiny_config

IMAGE = {"kind": "image", "size": 18, "patch": 6, "stem": "linear"}
PUZZLE = {"kind": "view", "parts": ["image"], "transforms": ["jigsaw", "rotate"]}


def config_of(**representations: Any) -> RunConfig:
    pairs = {f"image-{name}": 1.0 for name in representations}
    return tiny_config(
        Path("unused"),
        modalities={"image": IMAGE, "text": {"kind": "text", "max_tokens": 8}},
        representations=representations,
        objectives={"pretext": {"kind": "contrastive", "pairs": pairs or {"image-text": 1.0}}},
    )


def sample_of(seed: int) -> Sample:
    value = np.random.default_rng(seed).integers(0, 256, (3, 18, 18), dtype=np.uint8)
    return Sample(SampleMeta(f"s{seed}", group=f"g{seed}"), (Item("image", value),))


def test_a_view_is_embedded_beside_its_item_after_its_transforms() -> None:
    settings = pack_settings(config_of(puzzle=PUZZLE))
    samples = [sample_of(i) for i in range(3)]
    batch = pack(samples, settings, [7, 8, 9])
    pixels = batch.inputs["image"]["pixels"].numpy()
    assert len(pixels) == 6
    stream = f"objective/{settings.objectives.streams['pretext']}"
    for b, (sample, position) in enumerate(zip(samples, (7, 8, 9), strict=True)):
        rng = settings.generator(position, stream)
        expected = transforms.rotate(transforms.jigsaw(sample.items[0].value, rng), rng)
        np.testing.assert_array_equal(pixels[b], sample.items[0].value)
        np.testing.assert_array_equal(pixels[3 + b], expected)
    again = pack(samples, settings, [7, 8, 10]).inputs["image"]["pixels"].numpy()
    assert np.array_equal(again[:5], pixels[:5]) and not np.array_equal(again[5], pixels[5])


def test_a_view_has_its_own_segment_and_head() -> None:
    config = config_of(puzzle=PUZZLE)
    batch = pack([sample_of(0), sample_of(1)], pack_settings(config))
    assert sorted(batch.pooled["image"].tolist() + batch.pooled["puzzle"].tolist()) == [0, 1, 2, 3]
    outputs, _ = MMMoE(config)(batch)
    assert outputs.features.keys() == {"image", "puzzle"}


@pytest.mark.parametrize(
    ("view", "complaint"),
    [
        (
            {**PUZZLE, "transforms": ["jigsaw", "melt"]},
            r"representations\.puzzle\.transforms melt: modality image has",
        ),
        ({**PUZZLE, "parts": ["text"]}, r"transforms jigsaw, rotate: modality text has drop"),
        ({**PUZZLE, "transforms": []}, "at least 1 item"),
        ({**PUZZLE, "parts": ["image", "text"]}, "at most 1 item"),
    ],
)
def test_views_that_mean_nothing_are_refused(view: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        pack_settings(config_of(puzzle=view))
