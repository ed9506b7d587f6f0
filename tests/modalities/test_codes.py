"""Codes as a modality: what `decode` and `render` make of a file, the settings that must suit it, and sound."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from mmmoe_pretrain.checkpoint.model import read_config
from mmmoe_pretrain.data_prep import codes as training
from mmmoe_pretrain.modalities.audio import Audio, AudioSettings
from mmmoe_pretrain.modalities.audio_codes import AudioCodes, AudioCodesSettings
from mmmoe_pretrain.modalities.codes import Codes
from mmmoe_pretrain.modalities.fsq import Codebook, Levels, Network
from mmmoe_pretrain.modalities.image_codes import ImageCodes, ImageCodesSettings
from mmmoe_pretrain.train import start
from tests.support import tiny_config

IMAGE = {"kind": "image", "size": 16, "patch": 4, "augment": False}
AUDIO = {"kind": "audio", "n_mels": 16, "patch": 1, "stem": "linear", "max_seconds": 0.5, "augment": False}


def write(path: Path, media: dict[str, Any], channels: int, patch: tuple[int, int]) -> Codebook:
    network = Network(channels, patch, 8, Levels((5, 3)))
    weights = training.first_weights(network, 1, torch.device("cpu"))
    Codebook(network, {name: x.detach().numpy() for name, x in weights.items()}, media, {}).write(path)
    return Codebook.read(path)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def wav(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="wav")
    return file.getvalue()


def tone(hertz: float, seconds: float = 0.4) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000)


def images(path: Path, **changed: Any) -> ImageCodes:
    return ImageCodes("drawing", ImageCodesSettings(tokenizer=str(path), codes=15, **{"max_tokens": 16, **changed}))


def test_a_value_is_the_codes_of_the_image_row_by_row_between_marks(tmp_path: Path) -> None:
    its = write(tmp_path / "c.npz", IMAGE, 3, (4, 4))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    modality = images(tmp_path / "c.npz")
    value = modality.decode(png(pixels))
    assert value is not None and value.dtype == np.int64
    codes = its.encode(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    np.testing.assert_array_equal(value, [15, *codes.ravel(), 16])
    assert modality.marks == (15, 16)
    assert modality.settings.vocabulary == 24  # 15 codes and two marks, up to a multiple of 8
    assert set(np.flatnonzero(modality.may_follow(24))) == {*range(15), 16}


def test_a_rendered_image_is_what_the_decoder_makes_of_the_codes(tmp_path: Path) -> None:
    its = write(tmp_path / "c.npz", IMAGE, 3, (4, 4))
    ids = np.random.default_rng(0).integers(0, 15, 16)
    data, extension = images(tmp_path / "c.npz").render(np.array([15, *ids, 16]))
    made = its.decode(ids.reshape(4, 4)).transpose(1, 2, 0)
    assert extension == "png"
    shown = np.asarray(PIL.Image.open(io.BytesIO(data))).astype(float)
    np.testing.assert_allclose(shown, np.clip((made + 1) * 127.5, 0, 255), atol=0.51)  # whole numbers
    for few in (ids[:3], ids[:0]):  # of a generation that ended early
        assert PIL.Image.open(io.BytesIO(images(tmp_path / "c.npz").render(few)[0])).size == (16, 16)


def test_settings_that_do_not_suit_the_file_are_told(tmp_path: Path) -> None:
    write(tmp_path / "c.npz", IMAGE, 3, (4, 4))
    data = png(np.zeros((16, 16, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has 15 codes, and the modality codes: 12; set codes: 15"):
        ImageCodesSettings(tokenizer=str(tmp_path / "c.npz"), codes=12, max_tokens=16).with_file()
    with pytest.raises(ValueError, match=r"has codes for kind image_codes, and the modality has kind audio_codes"):
        AudioCodesSettings(tokenizer=str(tmp_path / "c.npz"), codes=15, max_tokens=16).with_file()
    with pytest.raises(ValueError, match=r"has max_tokens 9: its images have 16 codes each; set max_tokens: 16"):
        images(tmp_path / "c.npz", max_tokens=9).decode(data)
    write(tmp_path / "a.npz", AUDIO, 1, (8, 8))
    with pytest.raises(ValueError, match=r"max_tokens 1: a column has 2 codes; set max_tokens: 2 or more"):
        AudioCodesSettings(tokenizer=str(tmp_path / "a.npz"), codes=15, max_tokens=1).with_file()
    known = ImageCodesSettings(tokenizer=str(tmp_path / "c.npz"), codes=15, max_tokens=16).with_file()
    assert len(known.fingerprint) == 32
    write(tmp_path / "c.npz", {**IMAGE, "size": 32}, 3, (4, 4))
    with pytest.raises(ValueError, match="has fingerprint"):
        known.with_file()


def test_audio_runs_through_time_and_is_cut_to_whole_columns(tmp_path: Path) -> None:
    its = write(tmp_path / "c.npz", AUDIO, 1, (8, 8))
    settings = AudioSettings(**{k: v for k, v in AUDIO.items() if k != "kind"})
    mel = Audio("speech", settings).decode(wav(tone(700)))
    assert mel is not None
    mel = np.pad(mel, ((0, 0), (0, -mel.shape[1] % 8)), constant_values=mel.min())
    codes = its.encode(mel[None])
    assert codes.shape == (2, 6)  # 16 bands, and 0.4 s of 41 frames and 7 more
    speech = AudioCodes("speech", AudioCodesSettings(tokenizer=str(tmp_path / "c.npz"), codes=15, max_tokens=7))
    value = speech.decode(wav(tone(700)))
    assert value is not None and speech.cut == 1
    np.testing.assert_array_equal(value, [15, *codes[:, :3].T.ravel(), 16])  # 7 codes are 3 columns of 2
    data, extension = speech.render(value)
    sound, rate = soundfile.read(io.BytesIO(data))
    assert (extension, rate, len(sound)) == ("wav", 16_000, 23 * 160 + 1)
    assert Codes.render(speech, np.array([15, 3])), "of no whole column, too"


def test_a_sound_of_a_spectrogram_has_its_pitch_and_its_spectrogram() -> None:
    """Tones of 440 Hz, then 1,320 Hz: the loudest frequency of each half, and the log-mel of the sound that is made,
    which differs by less than a quarter of the standard deviation where there is sound. Phases are not known."""
    settings = AudioSettings(augment=False, patch=1, max_seconds=2.0, trim=False)
    audio = Audio("speech", settings)
    wave = np.concatenate([tone(440), tone(1320)])
    mel = audio.decode(wav(wave))
    assert mel is not None
    heard = audio.audible(mel)
    assert heard is not None
    sound, _ = heard
    for half, hertz in ((sound[:6400], 440), (sound[6400:], 1320)):
        spectrum = np.abs(np.fft.rfft(half[800:-800] * np.hanning(len(half) - 1600)))
        loudest = np.fft.rfftfreq(len(half) - 1600, 1 / 16_000)[spectrum.argmax()]
        assert loudest == pytest.approx(hertz, rel=0.05)  # mel bands are about a tenth apart
    again = audio.decode(wav(0.9 * sound / np.abs(sound).max()))
    assert again is not None and again.shape == mel.shape
    loud = mel > 0
    assert np.abs(again - mel)[loud].mean() < 0.25


def test_a_run_keeps_its_own_copy_of_the_tokenizer(tmp_path: Path) -> None:
    """The original may move; an override that names another file, or the whole modality, is followed."""
    write(tmp_path / "c.npz", IMAGE, 3, (4, 4))
    picture = {"kind": "image_codes", "tokenizer": str(tmp_path / "c.npz"), "codes": 15, "max_tokens": 16}
    drawing = {"drawing": {"kind": "next_token", "parts": ["picture"]}}
    config = tiny_config(tmp_path, modalities={"picture": picture}, objectives=drawing).with_files()
    config.run_dir.mkdir(parents=True)
    start.write_config(config, "")
    (tmp_path / "c.npz").rename(tmp_path / "moved.npz")

    def reads(*overrides: str) -> str:
        return Path(read_config(config.run_dir, overrides).modalities["picture"].file).name

    assert reads() == reads("modalities.picture.members=[left.png]") == "modalities.picture.npz"
    assert reads(f"modalities.picture.tokenizer={tmp_path / 'moved.npz'}") == "moved.npz"
    assert read_config(config.run_dir).with_files() == read_config(
        config.run_dir
    )  # the fingerprint is that of the copy
    write(config.run_dir / "modalities.picture.npz", {**IMAGE, "fit": "crop"}, 3, (4, 4))
    with pytest.raises(ValueError, match=r"has fingerprint .* the run was made with"):
        read_config(config.run_dir).with_files()
