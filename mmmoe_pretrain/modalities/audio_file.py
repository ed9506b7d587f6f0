"""Encoded audio -> samples: all that are in the file, or a ValueError.

libsndfile trusts the length in the header and stops there without an error: an MP3 of variable bit rate
without its index (the Xing frame) ends after an estimate, a WAV or FLAC with too small a count ends early, and of
Ogg streams one after another only the first is read. Here the length is taken from the content before a decoder
sees it: a header is corrected where the whole clip can then be read, and the clip is refused where it cannot.

Formats: RIFF WAVE (Microsoft, 1991), FLAC (RFC 9639), Ogg (RFC 3533), MPEG audio layer III (ISO 11172-3, 13818-3).
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmmoe_pretrain.limits import audio_problem, audio_start_problem

if TYPE_CHECKING:
    import numpy as np
    import soundfile
    from numpy.typing import NDArray

_UNKNOWN_SIZE = 0x7FFF_F000  # from here on, sizes in a WAV are what writers to a pipe put there
_FLAC_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # a stream with its 34 bytes of STREAMINFO
_ID3V1_BYTES = 128  # of a tag at the end of the file
_MAX_PARTS = 100_000  # chunks, pages or frames: the longest clip has half as many
_MAX_FLAC_FRAME = 1 << 18  # bytes that are searched for the last frame, which has some 10 KiB
_MAX_FLAC_TRIES = 1000  # of places that could be its header
_MAX_FLAC_CHECKS = 8  # of those that are one by their own checksum
_MP3_MISSING = 2 * 1152  # samples that a decoder may skip at the start of a cut stream
_MP3_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1; MPEG 2 and 2.5 have a half and a quarter
_MP3_KBITS = (  # by bitrate index 1 to 14: MPEG 1, then MPEG 2 and 2.5
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)


def open_audio(data: bytes) -> soundfile.SoundFile:
    """The clip in ``data``, within the limits, with its true length in ``frames``."""
    import soundfile

    problem = audio_start_problem(data)
    if problem:
        problem = f"cannot be decoded: {problem}"
    else:
        whole = with_true_length(data)
        try:
            file = soundfile.SoundFile(io.BytesIO(whole))
        except soundfile.LibsndfileError as error:
            raise ValueError(f"audio cannot be decoded: {error.error_string}") from None
        problem = audio_problem(file.samplerate, file.channels, file.frames)
    if problem:
        raise ValueError(f"audio {problem}")
    return file


def read_mono(file: soundfile.SoundFile, most: int | None = None, start: int = 0) -> NDArray[np.float32]:
    """``read_samples``, mixed to one channel."""
    wave = read_samples(file, most, start)
    return wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)


def read_samples(file: soundfile.SoundFile, most: int | None = None, start: int = 0) -> NDArray[np.float32]:
    """[samples, channels]: all from ``start`` on, or the first ``most`` of them. An MP3 is read from its beginning by
    one read: seeking in one is inexact, and soundfile seeks between two reads."""
    import soundfile

    left = file.frames - start
    wanted = left if most is None else min(most, left)
    skipped = start if file.format == "MP3" else 0
    try:
        if start and not skipped:
            file.seek(start)
        wave = file.read(skipped + wanted, dtype="float32", always_2d=True)[skipped:]
    except soundfile.LibsndfileError as error:
        raise ValueError(f"audio cannot be decoded: {error.error_string}") from None
    if not len(wave) or len(wave) < wanted - (_MP3_MISSING if file.format == "MP3" else 0):
        raise ValueError(f"audio ends after {start + len(wave)} of the {file.frames} samples that its header states")
    return wave


def decoders() -> str:
    """What decodes and resamples audio here, for the log."""
    import soundfile
    import soxr

    return (
        f"soundfile {soundfile.__version__} (libsndfile {soundfile.__libsndfile_version__}), soxr {soxr.__version__}"
    )


def with_true_length(data: bytes) -> bytes:
    """``data`` with a header that has the clip's length, and without an ID3 tag before it."""
    if data.startswith(b"ID3"):
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
        data = data[10 + size :]
    if data.startswith(b"RIFF"):
        return _wav(data)
    if data.startswith(b"fLaC"):
        return _flac(data)
    if data.startswith(b"OggS"):
        _check_ogg(data)
        return data
    return _mp3(data)


def _wav(data: bytes) -> bytes:
    at = next((at for at in _chunks(data, 12, len(data)) if data[at : at + 4] == b"data"), len(data))
    if at + 8 > len(data):
        return data  # without a chunk of samples: libsndfile reports it
    said, there = int.from_bytes(data[at + 4 : at + 8], "little"), len(data) - at - 8
    end = at + 8 + said
    if said >= _UNKNOWN_SIZE or (said == 0 and not _only_chunks(data, end)):
        return data[: at + 4] + min(there, _UNKNOWN_SIZE - 1).to_bytes(4, "little") + data[at + 8 :]
    if said > there:
        raise ValueError(f"audio ends after {there} of the {said} bytes that its header states")
    if not (_only_chunks(data, end) or _only_chunks(data, end + said % 2)):
        raise ValueError(f"audio has {there} bytes, and its header states {said}")
    return data


def _only_chunks(data: bytes, start: int) -> bool:
    """Whether chunks, an ID3v1 tag or zeros are all that there is from ``start`` on."""
    end = len(data) - (_ID3V1_BYTES if data[-_ID3V1_BYTES:].startswith(b"TAG") else 0)
    at = start
    for at in _chunks(data, start, end):
        name = data[at : at + 4]
        if not (name.isascii() and name.decode().isprintable()):
            break
    return at <= end + 1 and not data[at:end].strip(b"\0")


def _chunks(data: bytes, at: int, end: int) -> Iterator[int]:
    """Where each chunk of a WAV begins, from ``at`` on, and where the last one ends."""
    for _ in range(_MAX_PARTS):
        yield at
        if end - at < 8:
            return
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    raise ValueError(f"audio has more than {_MAX_PARTS} chunks; write it again")


def _flac(data: bytes) -> bytes:
    if max(data.find(start, 4) for start in _FLAC_STARTS) > 0:
        raise ValueError("audio holds several FLAC streams one after another; decode and join them first")
    fields = int.from_bytes(data[18:26], "big")
    stated = fields & (1 << 36) - 1
    found = _flac_samples(data, stated)
    if not found:
        raise ValueError("audio does not say how long it is, and its last FLAC frame is damaged")
    if not stated < found < 1 << 36:  # where it is less, libsndfile will not decode it
        return data
    return data[:18] + (fields - stated + found).to_bytes(8, "big") + data[26:]


def _flac_samples(data: bytes, stated: int) -> int:
    """Samples up to the end of the last frame, by its header; ``stated`` unless a checksum proves otherwise."""
    stop = len(data) - (_ID3V1_BYTES if data[-_ID3V1_BYTES:].startswith(b"TAG") else 0)
    fixed_size = int.from_bytes(data[8:10], "big")
    at, first, checks = stop, max(42, stop - _MAX_FLAC_FRAME), 0
    for _ in range(_MAX_FLAC_TRIES):
        at = max(data.rfind(b"\xff\xf8", first, at), data.rfind(b"\xff\xf9", first, at))
        if at < 0:
            break
        header = _flac_frame(data[at : min(at + 16, stop)])
        if header is not None:
            number, size = header
            found = (number if data[at + 1] & 1 else number * fixed_size) + size
            if found == stated or crc(data[at:stop], 16, 0x8005) == 0:
                return found
            checks += 1
            if checks == _MAX_FLAC_CHECKS:
                break
    return stated


def _flac_frame(header: bytes) -> tuple[int, int] | None:
    """The number of a frame (of its first sample, where sizes vary) and its samples; None if this is not a header."""
    if len(header) < 6 or header[3] & 1:
        return None
    size_code, rate_code = header[2] >> 4, header[2] & 15
    extra = max(0, 8 - (header[4] ^ 0xFF).bit_length() - 1)  # bytes of the number after its first, as in UTF-8
    size_bytes, rate_bytes = {6: 1, 7: 2}.get(size_code, 0), {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    at = 5 + extra
    end = at + size_bytes + rate_bytes
    if size_code == 0 or rate_code == 15 or extra > 6 or end >= len(header) or crc(header[: end + 1], 8, 0x07):
        return None
    number = header[4] & (0x7F >> (extra + 1 if extra else 0))
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    if size_bytes:
        return number, int.from_bytes(header[at : at + size_bytes], "big") + 1
    return number, 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8


def crc(data: bytes, bits: int, polynomial: int) -> int:
    """A cyclic redundancy check of so many bits; 0 for bytes that end with their own checksum."""
    table = _crc_table(bits, polynomial)
    value, mask = 0, (1 << bits) - 1
    for byte in data:
        value = (value << 8 & mask) ^ table[(value >> bits - 8) ^ byte]
    return value


@functools.cache
def _crc_table(bits: int, polynomial: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial | 1 << bits if value >> bits - 1 else 0)
        table.append(value)
    return tuple(table)


def _check_ogg(data: bytes) -> None:
    at, begun = 0, False
    pages: dict[bytes, int] = {}  # stream -> number of its latest page
    for _ in range(_MAX_PARTS):
        lacing = data[at + 27 : at + 27 + data[at + 26]] if at + 27 <= len(data) else b""
        end = at + 27 + len(lacing) + sum(lacing)
        if at + 27 > len(data) or len(lacing) < data[at + 26] or end > len(data):
            raise ValueError(f"audio ends inside of an Ogg page, at byte {len(data)}: it is truncated")
        starts = bool(data[at + 5] & 2)
        if starts and begun:
            raise ValueError("audio holds several Ogg streams one after another; decode and join them first")
        begun = not starts
        stream, number = data[at + 14 : at + 18], int.from_bytes(data[at + 18 : at + 22], "little")
        if number != pages.get(stream, number - 1) + 1:
            raise ValueError(f"audio lacks Ogg pages before byte {at}")
        pages[stream] = number
        at = data.find(b"OggS", end)
        if at < 0:
            return
    raise ValueError(f"audio has more than {_MAX_PARTS} Ogg pages: longer than the limits allow; cut it")


def _mp3(data: bytes) -> bytes:
    """With an index frame that tells the number of frames, unless it has one that is right."""
    places = list(_mp3_frames(data))
    if not places:
        return data  # another layer, or none: left to the decoder
    first = data[places[0] : places[0] + 4]
    index = _mp3_index(data, places[0])
    frames = len(places) - (index is not None)
    if index is not None and abs(index - frames) <= 1:
        return data
    if index is not None and index > frames:
        raise ValueError(f"audio ends after {frames} of the {index} MP3 frames that its header states")
    start = places[len(places) - frames] if frames else len(data)
    is_v1 = bool(first[1] & 8)
    # 64 kbit/s, without a checksum: room enough for the index at every sample rate.
    header = bytes((first[0], first[1] | 1, (5 if is_v1 else 8) << 4 | first[2] & 0x0C, first[3]))
    length = _mp3_length(header)
    body = struct.pack(">4sIII", b"Xing", 3, frames, length + len(data) - start)  # 3: the frames and the bytes follow
    return (header + bytes(_side_info(header)) + body).ljust(length, b"\0") + data[start:]


def _mp3_frames(data: bytes) -> Iterator[int]:
    """Where each whole frame begins; bytes between frames are passed over, as decoders do."""
    at, first = 0, b""
    for _ in range(_MAX_PARTS):
        if at + 4 > len(data):
            return
        length = _mp3_length(data[at : at + 4], first)
        after = at + length
        follows = after >= len(data) - 3 or _mp3_length(data[after : after + 4], first or data[at : at + 4])
        if length and after <= len(data) and (follows or first):
            first = first or data[at : at + 4]
            yield at
            at = after
        else:
            at = data.find(b"\xff", at + 1)
            if at < 0:
                return
    raise ValueError(
        f"audio has more than {_MAX_PARTS} MP3 frames, or bytes between them: longer than the limits allow; cut it"
    )


def _mp3_length(header: bytes, like: bytes = b"") -> int:
    """Bytes of the layer III frame with this header (of the version and rate of ``like``), 0 where it is none."""
    version, layer, kbits, rate = header[1] >> 3 & 3, header[1] >> 1 & 3, header[2] >> 4, header[2] >> 2 & 3
    if header[0] != 0xFF or header[1] < 0xE0 or version == 1 or layer != 1 or not 0 < kbits < 15 or rate == 3:
        return 0
    if like and (header[1] ^ like[1]) & 0xFE | (header[2] ^ like[2]) & 0x0C:
        return 0
    hertz = _MP3_RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * 1000 * _MP3_KBITS[version != 3][kbits - 1] // hertz + (header[2] >> 1 & 1)


def _side_info(header: bytes) -> int:
    """Bytes between the header and the main data."""
    is_mono = header[3] >> 6 == 3
    return (17 if is_mono else 32) if header[1] & 8 else (9 if is_mono else 17)


def _mp3_index(data: bytes, at: int) -> int | None:
    """The number of frames by the Xing or VBRI index in the frame at ``at``; None where it has none."""
    xing = at + 4 + _side_info(data[at : at + 4])
    if data[xing : xing + 4] in (b"Xing", b"Info"):
        return int.from_bytes(data[xing + 8 : xing + 12], "big") if data[xing + 7] & 1 else 0
    if data[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(data[at + 50 : at + 54], "big")
    return None
