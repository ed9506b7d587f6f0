"""The values of a small routing report, made by hand: two layers of four experts, images, sounds and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image

from mmmoe_pretrain.evaluate.routing import history
from mmmoe_pretrain.evaluate.routing.history import LayerHistory
from mmmoe_pretrain.evaluate.routing.html import rounded
from mmmoe_pretrain.evaluate.routing.media import sound_of, thumbnail_of

MODALITIES = ("image", "audio", "text")
RATE = 16_000
SHARES = {"image": [0.7, 0.2, 0.1, 0.0], "audio": [0.0, 0.0, 0.05, 0.95], "text": [0.1, 0.4, 0.5, 0.0]}


def report_of(word: str = "word", layers: int = 2) -> dict[str, Any]:
    """``word`` stands wherever a text of the data does."""
    squares = np.full((48, 48, 3), 255, dtype=np.uint8)
    squares[8:16, 32:40] = 0
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    media = [
        {"modality": "image", "sample": word, "thumbnail": thumbnail_of(PIL.Image.fromarray(squares)), "sound": None},
        {"modality": "audio", "sample": word, "thumbnail": thumbnail_of(PIL.Image.new("RGB", (100, 64), "grey")),
         "sound": sound_of(wave, RATE)},
    ]  # fmt: skip
    return rounded({
        "version": 1, "run": word, "step": 1200, "test": [word], "samples": 430,
        "layers": [_layer(2 * number + 1, word) for number in range(layers)],
        "history": history.in_json([_history(2 * number + 1) for number in range(layers)]),
        "media": media, "left_out": {"layers": 0, "tokens": 7, "thumbnails": 0, "sounds": 0}, "notes": [word],
    })  # fmt: skip


def _layer(number: int, word: str) -> dict[str, Any]:
    by_modality = dict.fromkeys(MODALITIES, 0.0)
    image = _token(word, media=0, box=(4 / 6, 1 / 6, 5 / 6, 2 / 6), position={"pixels": [32, 8, 40, 16]})
    sound = _token(word, media=1, box=(0.25, 0.0, 0.5, 1.0), position={"seconds": [0.25, 0.5]})
    piece = _token(word, excerpt=["a ", word, " dog"], position={"piece": word})
    series = _token(word, position={word: [1, 2]})
    return {
        "layer": number, "experts": 4, "shown": True, "dead": [], "free_experts": {"null": [3]}, "share": SHARES,
        "share_by_task": {word: [0.25] * 4, "captions": [0.4, 0.3, 0.2, 0.1]},
        "specialisation": 0.5, "specialisation_untrained": 0.25, "specialisation_bits": 0.79, "modality_bits": 1.58,
        "specialisation_by_task": {word: 0.5, "captions": 0.25}, "task_specialisation": {"text": 0.125},
        "tokens": dict.fromkeys(MODALITIES, 1000.0), "experts_used": dict.fromkeys(MODALITIES, 2.0),
        "entropy_bits": by_modality, "dropped": by_modality, "mean_probability": SHARES,
        "pairs": {"image": [[0, 1, 0.2]]},
        "top_tokens": [{"image": [image, image], "text": [piece]}, {"text": [series]}, {}, {"audio": [sound]}],
    }  # fmt: skip


def _token(word: str, **its: Any) -> dict[str, Any]:
    return {
        "sample": word, "item": 0, "token": 11, "task": word, "probability": 0.5, "log_probability": -0.69,
        "language": word, "sample_text": word, "excerpt": None, "media": None, "box": None, **its,
    }  # fmt: skip


def _history(layer: int) -> LayerHistory:
    """Three records; the first has no audio, and its images all go to expert 1."""
    load_RME = np.stack([np.array([*SHARES.values()])] * 3)
    load_RME[0, 0], load_RME[0, 1] = [0, 1, 0, 0], np.nan
    return LayerHistory(layer, MODALITIES, np.array([10, 20, 30]), load_RME)
