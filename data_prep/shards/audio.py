"""A clip -> its bytes in a shard: as they are, or mixed, resampled and encoded again as FLAC, WAV or Opus."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import xxhash

from mmmoe_pretrain.data_prep.shards.media import OPUS_RATES, Check, Media, MediaOptions, suffix_of
from mmmoe_pretrain.limits import DECODER_ERRORS, decoder_reason
from mmmoe_pretrain.modalities.audio_file import crc, open_audio, read_mono, read_samples

if TYPE_CHECKING:
    import numpy as np
    import soundfile
    from numpy.typing import NDArray

SUFFIXES = {"wav": ("wav", "wave"), "flac": ("flac",), "mp3": ("mp3",), "opus": ("opus", "ogg", "oga"),
            "ogg": ("ogg", "oga")}  # fmt: skip
ENCODINGS = {"flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "opus": ("OGG", "OPUS")}  # of soundfile
_LOUDEST = 1000.0  # 1 is full scale; what soxr does to floats that are much louder is not a number
_AT_ONCE = 1 << 16  # frames that are encoded by one call
_OGG_POLYNOMIAL = 0x04C11DB7  # of a page's checksum (RFC 3533, 6)


def audio_member(name: str, data: bytes, options: MediaOptions, check: Check) -> Media:
    """The clip in ``data``; ``check`` gets its facts before it is encoded. Raises ValueError, with the rest of a
    sentence."""
    import numpy as np

    try:
        with open_audio(data) as file:
            found, rate = _format(file), file.samplerate
            target = _target(found, file, options)
            is_mixed = target is None or options.audio_channels != "keep"
            wave = read_mono(file)[:, None] if is_mixed else read_samples(file)
        if not np.isfinite(wave).all():
            raise ValueError("it holds NaN or infinite samples")
        facts = {"seconds": len(wave) / rate, "sample_rate": rate, "audio_xxh3": xxhash.xxh3_128_hexdigest(data)}
        check(facts)
        if target is None:
            return Media(suffix_of(name, SUFFIXES[found]), data, facts)
        wanted = options.audio_rate or (_opus_rate(rate) if target == "opus" else rate)
        return Media(target, _encode(wave, rate, wanted, target), facts, encoded=True)
    except DECODER_ERRORS as error:
        raise ValueError(f"is not readable audio: {decoder_reason(error)}") from None


def audio_seconds(data: bytes) -> float:
    """Length of an encoded clip within the limits."""
    try:
        with open_audio(data) as file:
            return float(file.frames / file.samplerate)
    except DECODER_ERRORS as error:
        raise ValueError(f"no readable audio: {decoder_reason(error)}") from None


def _format(file: soundfile.SoundFile) -> str:
    if file.format == "OGG":
        return "opus" if file.subtype == "OPUS" else "ogg"
    return {"FLAC": "flac", "MP3": "mp3"}.get(file.format, "wav")


def _target(found: str, file: soundfile.SoundFile, options: MediaOptions) -> str | None:
    """The format to encode as; None: the bytes stay. As of images, a lossy clip that needs no change stays."""
    is_mono = file.channels == 1 or options.audio_channels != "1"
    if options.audio_rate is None and is_mono and options.audio_format in ("keep", found):
        return None
    is_right = is_mono and options.audio_rate == file.samplerate
    if found == options.audio_format == "opus" and is_right:
        return None
    return "flac" if options.audio_format == "keep" else options.audio_format


def _opus_rate(rate: int) -> int:
    """The lowest rate of Opus that keeps all frequencies; 48 kHz of those above."""
    return next((each for each in OPUS_RATES if each >= rate), OPUS_RATES[-1])


def _encode(wave: NDArray[np.float32], found_rate: int, rate: int, target: str) -> bytes:
    """``wave``: [samples, channels]."""
    import numpy as np
    import soundfile
    import soxr

    if found_rate != rate:
        wave = soxr.resample(np.clip(wave, -_LOUDEST, _LOUDEST), found_rate, rate, quality="HQ")
    if not len(wave):
        raise ValueError(f"it is shorter than one sample at {rate} Hz")
    buffer = io.BytesIO()
    container, subtype = ENCODINGS[target]
    wave = np.clip(wave, -1.0, 1.0)
    with soundfile.SoundFile(buffer, "w", rate, wave.shape[1], subtype, format=container) as file:
        for start in range(0, len(wave), _AT_ONCE):
            file.write(wave[start : start + _AT_ONCE])
    return _with_serial(buffer.getvalue()) if target == "opus" else buffer.getvalue()


def _with_serial(data: bytes, serial: int = 1) -> bytes:
    """An Ogg stream with this serial number in each page; libsndfile draws one, and equal input gives equal bytes."""
    pages, at = [], 0
    while at < len(data):
        lacing = data[at + 27 : at + 27 + data[at + 26]]
        end = at + 27 + len(lacing) + sum(lacing)
        page = bytearray(data[at:end])
        page[14:18], page[22:26] = serial.to_bytes(4, "little"), bytes(4)
        page[22:26] = crc(bytes(page), 32, _OGG_POLYNOMIAL).to_bytes(4, "little")
        pages.append(bytes(page))
        at = end
    return b"".join(pages)
