"""Any clip becomes a log-mel spectrogram, and padding never reaches a valid token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mmmoe_pretrain.modalities import BadSampleError
from mmmoe_pretrain.modalities import audio as audio_module
from mmmoe_pretrain.modalities.audio import Audio
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.audio_stem import AudioEmbedder
from tests.support import audio_bytes as encoded

CONFIG = AudioSettings(n_mels=40, max_seconds=1.0, patch=8, stem_channels=8)
RATE = CONFIG.sample_rate


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def decode(data: bytes, rng: np.random.Generator | None = None, audio: Audio | None = None) -> np.ndarray:
    value = (audio or Audio("audio", CONFIG)).decode(data, rng)
    assert value is not None
    return value


def band_of(hertz: float) -> int:
    """The mel band whose centre is nearest: n_mels + 2 points evenly spaced on the HTK scale."""
    mel = [2595 * np.log10(1 + f / 700) for f in (CONFIG.fmin, hertz, RATE / 2)]
    return round((mel[1] - mel[0]) / (mel[2] - mel[0]) * (CONFIG.n_mels + 1)) - 1


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 2500.0, 6000.0])
def test_a_pure_tone_peaks_in_its_band(hertz: float) -> None:
    mel = decode(encoded(tone(hertz)))
    peaks = mel[:, 8:-8].argmax(axis=0)
    assert np.abs(peaks - band_of(hertz)).max() <= 1


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "OPUS", "MP3"])
def test_rate_and_format_do_not_change_what_is_heard(rate: int, form: str) -> None:
    if form == "OPUS" and rate not in (8_000, 48_000):
        pytest.skip("Opus has its own rates")
    kind = ("OGG", "OPUS") if form == "OPUS" else (form, None)
    mel = decode(encoded(tone(1000, rate=rate), *kind, rate=rate))
    # 0.5 s are 51 frames of 10 ms; a codec may add or trim a few milliseconds
    assert mel.shape == (40, 56)
    assert abs(int(mel[:, 25].argmax()) - band_of(1000)) <= 1


def test_stereo_is_mixed_and_loudness_does_not_matter() -> None:
    wave = tone(500)
    quiet = encoded(wave * 0.1, subtype="FLOAT")
    stereo = encoded(np.stack([wave, wave], axis=1), subtype="FLOAT")
    expected = decode(encoded(wave, subtype="FLOAT"))
    for data in (quiet, stereo):
        np.testing.assert_allclose(decode(data), expected, atol=1e-3)


def test_the_spectrogram_is_that_of_every_frame_by_itself() -> None:
    """2 s are 201 frames: several blocks. In fp64, of the definition."""
    audio = Audio("audio", AudioSettings(normalization="none", trim=False, patch=1))
    wave = 0.3 * np.random.default_rng(0).normal(size=2 * RATE).clip(-3, 3)
    found = decode(encoded(wave, subtype="FLOAT"), audio=audio)
    padded = np.pad(wave.astype(np.float32).astype(float), 256)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.stack([padded[160 * i : 160 * i + 512] * window for i in range(201)])
    energy = np.abs(np.fft.rfft(frames)) ** 2 @ audio_module.mel_filters(AudioSettings()).astype(float).T
    np.testing.assert_allclose(found, np.log10(np.maximum(energy, 1e-10)).T, atol=2e-3)


def test_numpy_s_blas_has_one_thread_in_the_spectrogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data workers on cores in use would wait for the threads of one another: 50 ms a clip, and 3 with one thread."""

    def of_numpy() -> set[int]:
        """Other packages bring libraries of their own."""
        found = [library for library in threadpool_info() if library["user_api"] == "blas"]
        return {library["num_threads"] for library in found if "numpy" in library["filepath"]}

    class Filters(np.ndarray):
        def __matmul__(self, other: np.ndarray) -> np.ndarray:
            threads.update(of_numpy())
            return np.asarray(self) @ other

    threads = set[int]()
    made = audio_module.mel_filters
    monkeypatch.setattr(audio_module, "mel_filters", lambda *given: made(*given).view(Filters))
    with threadpool_limits(2, user_api="blas"):
        decode(encoded(tone(440)))
        assert threads == {1}
        assert of_numpy() == {2}


def test_normalization_is_by_clip_by_data_set_or_none() -> None:
    loud, quiet = (encoded(tone(500) * gain, subtype="FLOAT") for gain in (1.0, 0.1))
    none, scaled = (
        Audio("audio", AudioSettings(**settings))
        for settings in ({"normalization": "none"}, {"normalization": "global", "mean": -2.0, "std": 4.0})
    )
    first, second = decode(loud, audio=none), decode(quiet, audio=none)
    peak = np.unravel_index(first.argmax(), first.shape)
    assert first[peak] - second[peak] == pytest.approx(2, abs=1e-3)  # a tenth of the amplitude, two decades of energy
    np.testing.assert_allclose(decode(loud, audio=scaled), (first + 2) / 4, atol=1e-4)


@pytest.mark.parametrize(("form", "subtype"), [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
def test_a_random_part_of_a_long_clip_is_read_where_it_is(form: str, subtype: str | None) -> None:
    """A clip whose pitch rises from second to second: the peak's band says where a part begins."""
    wave = np.concatenate([tone(200 + 150 * second, 1.0) for second in range(20)])
    data = encoded(wave, form=form, subtype=subtype)
    audio = Audio("audio", CONFIG.model_copy(update={"crop": "random", "augment": False}))
    decoded = [decode(data, np.random.default_rng(seed), audio) for seed in range(40)]
    begins = [float(mel[:, 10].argmax()) for mel in decoded]
    assert min(begins) <= band_of(200 + 150 * 3) and max(begins) >= band_of(200 + 150 * 15)
    assert len(set(begins)) > 8
    for mel in decoded:
        assert mel.shape == (40, 104)  # all of the second that follows
    start = decode(data, audio=audio)  # without a generator
    assert abs(int(start[:, 10].argmax()) - band_of(200)) <= 1


def test_frames_are_a_multiple_of_the_patch_and_end_in_silence() -> None:
    # 0.11 s are 1760 samples and 1 + 1760 // 160 = 12 frames; 16 are the next multiple of 8
    mel = decode(encoded(tone(500, 0.11)))
    assert mel.dtype == np.float32
    assert mel.shape == (40, 16)
    assert (mel[:, 12:] == mel.min()).all()


def test_a_tiny_clip_takes_one_patch() -> None:
    assert decode(encoded(np.ones(1))).shape == (40, 8)


def test_a_long_clip_is_cut_and_counted() -> None:
    audio = Audio("audio", CONFIG)
    audio.decode(encoded(tone(500, 0.9)))
    assert audio.cut == 0
    # 1 s is 101 frames, 104 as a multiple of 8
    assert decode(encoded(tone(500, 3.0)), audio=audio).shape == (40, 104)
    assert audio.cut == 1


def test_silent_ends_are_trimmed() -> None:
    silence = np.zeros(RATE // 4)
    mel = decode(encoded(np.concatenate([silence, tone(500, 0.2), silence])))
    # 0.2 s and a margin of 0.05 s at both ends: 31 frames, 32 as a multiple of 8
    assert mel.shape == (40, 32)


def test_digital_silence_is_a_flat_finite_clip() -> None:
    mel = decode(encoded(np.zeros(RATE // 4)))
    np.testing.assert_allclose(mel, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"no sound at all", "cannot be decoded: has 15 bytes and is not WAV, FLAC, OGG or MP3"),
        (encoded(tone(500), form="FLAC")[:30], "cannot be decoded: "),
        (encoded(np.zeros(0)), "no samples"),
        (encoded(np.full(99, np.nan), subtype="FLOAT"), "NaN"),
        (encoded(np.zeros((9, 64))), "64 channels"),
        (encoded(np.zeros(99), rate=500), "500 Hz"),
    ],
)
def test_damage_is_a_bad_sample_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason) as error:
        decode(data)
    assert " at 0x" not in str(error.value)


def test_augmentation_is_a_function_of_the_generator() -> None:
    data = encoded(tone(700))
    first, again = (decode(data, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    lengths = {decode(data, np.random.default_rng(seed)).shape[1] for seed in range(20)}
    # a tempo of 1 -+ 0.08 makes 51 frames 47 to 55, all of which round up to 48 or 56
    assert lengths == {48, 56}


CONFIGS = [
    CONFIG.model_copy(update={"stem": stem, "positions": positions, "patch": patch})
    for stem in ("linear", "conv")
    for positions in ("learned", "rotary")
    for patch in (1, 2, 8)
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_clip_beside_others_has_the_tokens_that_it_has_alone(config: AudioSettings) -> None:
    torch.manual_seed(0)
    audio, embedder = Audio("audio", config), AudioEmbedder(config, 12)
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=(40, n * config.patch)).astype(np.float32) for n in (3, 7, 1)]
    clips[1] += 1e3

    def embed(values: list[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        collated = audio.collate(values)
        rows = embedder(**{name: torch.from_numpy(array) for name, array in collated.arrays.items()})
        assert rows.shape == (collated.arrays["log_mel"].shape[2] // config.patch, 12)
        return rows, collated.starts.tolist()

    rows, starts = embed(clips)
    for clip, start in zip(clips, starts, strict=True):
        (alone, (first,)), length = embed([clip]), clip.shape[1] // config.patch
        torch.testing.assert_close(rows[start : start + length], alone[first : first + length], atol=1e-4, rtol=1e-4)
    assert len(rows) == 3 + 7 + 1 + 2 * config.gap


def test_frames_that_fill_a_token_in_part_do_not_read_padding() -> None:
    embedder = AudioEmbedder(CONFIG, 12)
    clip = torch.randn(1, 40, 16)
    junk = clip.clone()
    junk[:, :, 11:] = 1e3
    valid = torch.tensor([11])
    torch.testing.assert_close(embedder(clip, valid), embedder(junk, valid))


def test_slaney_s_filters_are_on_its_scale_and_of_equal_area() -> None:
    """Bands of 200 / 3 Hz up to 1000 Hz, then each 6.4 ** (1 / 27) above the one before: centres at 1 to 42 mel."""
    config = AudioSettings(
        mel_scale="slaney", fmin=0, fmax=1000 * 6.4 ** (28 / 27), n_mels=42, n_fft=4096, sample_rate=16_000
    )
    filters = audio_module.mel_filters(config)
    hertz = np.arange(2049) * 16_000 / 4096
    expected = [mel * 200 / 3 if mel <= 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in range(1, 43)]
    np.testing.assert_allclose(hertz[filters.argmax(axis=1)], expected, atol=4)
    np.testing.assert_allclose(filters.sum(axis=1) * 16_000 / 4096, 1, atol=0.01)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"fmin": 9000}, "fmin 9000 to fmax 8000 Hz is no band"),
        ({"fmax": 9000}, "to fmax 9000 Hz is no band below half of sample_rate 16000"),
        ({"mean": -4.0}, "mean and std need normalization: global"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AudioSettings(**settings)


def test_filters_cover_the_band_without_a_gap() -> None:
    filters = audio_module.mel_filters(AudioSettings())
    assert (filters.max(axis=1) > 0).all()
    # neighbouring triangles sum to 1 between the first and the last centre
    inner = filters.sum(axis=0)[5:235]
    np.testing.assert_allclose(inner, 1, atol=1e-5)


def test_a_sound_is_the_clip_that_the_spectrogram_is_of() -> None:
    """Half a second of a quiet tone between silences: 0.05 s of those stay, the peak is 1, and a frame is 10 ms."""
    silence = np.zeros(RATE // 2)
    data = encoded(np.concatenate([silence, 0.25 * tone(500), silence]), subtype="FLOAT")
    found = Audio("audio", CONFIG).sound(data)
    assert found is not None
    wave, rate = found
    assert (rate, len(wave) / rate) == (RATE, pytest.approx(0.6, abs=0.01))
    assert np.abs(wave).max() == pytest.approx(1.0, abs=1e-6)
    assert decode(data).shape[1] == pytest.approx(len(wave) / rate * 100, abs=CONFIG.patch)


def test_a_sound_is_no_longer_than_what_is_read_and_no_louder_than_files_can_be() -> None:
    loud = CONFIG.model_copy(update={"normalization": "none"})
    wave, rate = Audio("audio", loud).sound(encoded(5 * tone(500, seconds=3.0), subtype="FLOAT")) or (np.zeros(0), 0)
    assert len(wave) == rate == RATE  # max_seconds is 1
    assert np.abs(wave).max() == pytest.approx(1.0, abs=1e-6)
