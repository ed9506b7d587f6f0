"""Values are rebuilt from their contents, and a sound from its spectrogram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import kinds
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.modalities.audio import Audio
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from tests.support import RATE, audio_bytes, tiny_values, write_tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "image", "size": 16, "patch": 4, "stem": "linear", "mean": [0.2, 0.5, 0.7], "std": [0.5, 0.25, 1.0]},
        {"kind": "audio", "max_seconds": 0.4},
        {"kind": "series", "channels": 3, "patch": 4, "max_steps": 24, "std": 2.0},
    ],
    ids=lambda settings: settings["kind"],
)
def test_contents_are_those_of_the_value_rebuilt_from_them(settings: dict[str, Any]) -> None:
    kind = kinds.MODALITIES.load(settings["kind"])
    modality = kind("it", kind.Settings.model_validate(settings))
    value = modality.example(np.random.default_rng(0))
    rebuilt = modality.rebuilt(modality.contents(value))
    np.testing.assert_array_equal(rebuilt, value)
    assert rebuilt.dtype == value.dtype


def test_a_text_ends_at_its_first_end_mark(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokens.model")
    config = run_config.parse(tiny_values(tmp_path))
    text = build_modalities(config.modalities, str(tokenizer))["text"]
    value = text.decode(b"red green")
    assert value is not None and value.tolist() == text.rebuilt(value[1:]).tolist()
    assert text.rebuilt(np.asarray([7, 8, 2, 9, 2])).tolist() == [1, 7, 8, 2]
    assert text.rebuilt(np.asarray([7] * 30)).tolist() == [1, *[7] * 16, 2]


def test_the_sound_of_a_spectrogram_has_this_spectrogram() -> None:
    """Of two tones, one after the other: the bands with energy agree, and the loudest is the same in almost every
    frame."""
    audio = Audio("audio", AudioSettings(max_seconds=0.5, trim=False, augment=False))
    seconds = np.arange(int(0.5 * RATE)) / RATE
    wave = np.where(seconds < 0.25, np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 1500 * seconds))
    value = audio.decode(audio_bytes(wave.astype(np.float32)))
    assert value is not None
    found = audio.audible(value)
    assert found is not None
    sound, rate = found
    assert rate == 16_000 and np.abs(sound).max() == pytest.approx(1.0)
    again = audio.decode(audio_bytes(sound, rate=rate))
    assert again is not None and again.shape == value.shape
    frames = slice(2, 48)  # without the ends
    assert (again.argmax(0)[frames] == value.argmax(0)[frames]).mean() > 0.9
    assert np.corrcoef(again[:, frames].ravel(), value[:, frames].ravel())[0, 1] > 0.9
