"""Audio files whose headers are wrong, missing or right about the length: all samples are read, or none."""

from __future__ import annotations

import io
import os
import struct
import threading

import numpy as np
import pytest
import soundfile

from mmmoe_pretrain.modalities.audio import Audio
from mmmoe_pretrain.modalities.audio_file import open_audio, read_mono
from mmmoe_pretrain.modalities.audio_settings import AudioSettings

RATE = 16_000


def encoded(kind: str, seconds: float = 1, rate: int = RATE, channels: int = 1, **options: object) -> bytes:
    """Noise for an eighth of the time and then a tone, of which an encoder of variable rate makes different
    frames."""
    frames = int(seconds * rate)
    wave = np.sin(np.arange(frames) * 0.17) / 2
    wave[: frames // 8] = np.random.default_rng(0).uniform(-0.7, 0.7, frames // 8)
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", rate, channels, format=kind, **options) as file:
        file.write(np.repeat(wave[:, None], channels, axis=1).astype("float32"))
    return out.getvalue()


def read(data: bytes) -> np.ndarray:
    with open_audio(data) as file:
        return read_mono(file)


def through_a_pipe(data: bytes) -> np.ndarray:
    """What libsndfile decodes where it can neither seek nor know the length: everything."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    blocks = []
    with soundfile.SoundFile(reader) as file:
        while len(block := file.read(4096, dtype="float32", always_2d=True)):
            blocks.append(block)
    thread.join()
    return np.concatenate(blocks).mean(axis=1)


def without_index(data: bytes) -> bytes:
    """An MP3 of soundfile's without its Xing frame: what is before the second sync word."""
    assert b"Xing" in data[:64] or b"Info" in data[:64]
    return data[data.index(data[:2], 2) :]


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (22_050, 2), (44_100, 1)])  # MPEG 2.5, 2 and 1
def test_an_mp3_of_variable_rate_without_its_index_is_read_to_the_end(rate: int, channels: int) -> None:
    whole = encoded("MP3", 4, rate, channels, bitrate_mode="VARIABLE", compression_level=0.5)
    assert len(read(whole)) == 4 * rate  # with its index nothing is wrong
    bare = without_index(whole)
    assert soundfile.info(io.BytesIO(bare)).frames < 2 * rate  # what libsndfile makes of it: less than half
    found, expected = read(bare), through_a_pipe(bare)
    assert len(found) >= 4 * rate
    # libsndfile leaves out the 529 samples of the decoder's delay (ISO 11172-3) where it knows the length.
    np.testing.assert_array_equal(found, expected[529:])
    audio = Audio("clips", AudioSettings(max_seconds=10))
    from_bare, from_whole = audio.decode(bare), audio.decode(whole)
    assert from_bare is not None and from_whole is not None
    assert abs(from_bare.shape[1] - from_whole.shape[1]) <= 16


def test_a_long_mp3_is_not_read_in_pieces() -> None:
    data = encoded("MP3", 8, 22_050, bitrate_mode="VARIABLE", compression_level=0.5)  # 176,400 samples
    np.testing.assert_array_equal(read(without_index(data)), through_a_pipe(without_index(data))[529:])


def test_mp3s_one_after_another_are_read_and_a_cut_one_is_refused() -> None:
    data = encoded("MP3", 4, bitrate_mode="CONSTANT")
    assert len(read(data + data)) >= 8 * RATE
    assert len(read(b"ID3\4\0\0\0\0\1\0" + b"\xff\xfb\x90\0" * 32 + data)) == 4 * RATE  # a tag of 128 bytes
    with pytest.raises(ValueError, match="cannot be decoded: Format not recognised"):
        read(b"ID3")  # a tag that was cut off
    assert len(read(data + b"TAG" + b"\xff" * 125)) == 4 * RATE
    with pytest.raises(ValueError, match=r"ends after \d+ of the 114 MP3 frames"):  # 64,000 samples and padding / 576
        read(data[: len(data) // 2])
    assert len(read(without_index(data)[: len(data) // 2])) > 1.5 * RATE  # no header states more


def wav(said: int, riff: int | None = None, after: bytes = b"") -> bytes:
    """A second of 16-bit samples at 16 kHz (44 bytes of header, 32,000 of samples) and what its header says."""
    data = bytearray(encoded("WAV", subtype="PCM_16"))
    assert data[36:44] == b"data" + struct.pack("<I", 32_000) and len(data) == 32_044
    data[40:44] = struct.pack("<I", said)
    if riff is not None:
        data[4:8] = struct.pack("<I", riff)
    return bytes(data) + after


LIST = b"LIST" + struct.pack("<I", 4) + b"INFO"


@pytest.mark.parametrize(
    "data",
    [
        wav(32_000),
        wav(32_000, after=LIST),
        wav(32_000, after=LIST + b"\0" * 100),
        wav(32_000, after=b"TAG" + b"\xff" * 125),
        wav(0xFFFF_FFFF, 0xFFFF_FFFF),  # written to a pipe by ffmpeg, SoX, and one that was killed
        wav(0x7FFF_F000, 0x7FFF_F024),
        wav(0, 0),
    ],
)
def test_a_wav_is_read_whole_where_its_header_is_right_or_says_nothing(data: bytes) -> None:
    np.testing.assert_array_equal(read(data), read(wav(32_000)))
    assert len(read(data)) == RATE


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (wav(16_000), "has 32000 bytes, and its header states 16000"),
        (wav(32_000)[:20_000], "ends after 19956 of the 32000 bytes"),
        (wav(32_000, after=b"\1\2" * 500), "has 33000 bytes, and its header states 32000"),
        (wav(0, after=LIST)[:44] + LIST, "has no samples"),
    ],
)
def test_a_wav_with_another_length_than_it_says_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(data)


def flac(stated: int) -> bytes:
    """A second at 16 kHz whose STREAMINFO states another number of samples (36 bits, from bit 172)."""
    data = bytearray(encoded("FLAC"))
    fields = int.from_bytes(data[18:26], "big")
    assert fields % 2**36 == RATE
    data[18:26] = (fields - RATE + stated).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize("stated", [0, 1, 8_000])  # 0: unknown, what an encoder writes to a pipe
@pytest.mark.parametrize("after", [b"", b"TAG" + b"\xff" * 125])
def test_a_flac_is_read_to_its_last_frame(stated: int, after: bytes) -> None:
    np.testing.assert_array_equal(read(flac(stated) + after), read(flac(RATE)))
    assert len(read(flac(RATE))) == RATE


def test_a_flac_of_silence_is_read() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(8000), RATE, format="FLAC")  # whose last frame is shorter than a long header
    assert len(read(out.getvalue())) == 8000


def test_a_flac_that_is_shorter_than_it_says_or_is_followed_by_another_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        read(flac(32_000))
    with pytest.raises(ValueError, match="several FLAC streams"):
        read(flac(RATE) + flac(RATE))
    with pytest.raises(ValueError, match="cannot be decoded"):
        read(flac(RATE)[: len(flac(RATE)) // 2])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_streams_that_libsndfile_would_cut_short_are_refused(subtype: str) -> None:
    data = encoded("OGG", 6, subtype=subtype)
    assert len(read(data)) == 6 * RATE
    pages = [at for at in range(len(data)) if data[at : at + 4] == b"OggS"]
    assert len(pages) > 3  # two of headers, two of audio
    for bad, complaint in (
        (data + data, "several Ogg streams"),
        (data[: pages[-2]] + data[pages[-1] :], "lacks Ogg pages"),
        (data[: pages[-1] + 100], "truncated"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read(bad)
