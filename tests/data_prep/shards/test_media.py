"""Images and audio that are unusual or damaged, on their way into a shard."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.shards import encode as encoding
from mmmoe_pretrain.data_prep.shards.encode import Encoder, member
from mmmoe_pretrain.data_prep.shards.media import Media, MediaOptions
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.modalities.audio_file import open_audio
from tests.support import audio_bytes, image_bytes

SMALL = ShardOptions(media=MediaOptions(image_size=16, audio_rate=4000), workers=1)


def write_shard(folder: Path, options: ShardOptions = SMALL, **paths: str) -> dict[str, bytes]:
    """The members of the one sample that has these files."""
    row = Row(key="a", text="t", split="train", **paths)
    shard_rows([row], folder, folder / "out", options)
    with tarfile.open(folder / "out/train/train-000000.tar") as tar:
        return {name.split(".")[1]: tar.extractfile(name).read() for name in tar.getnames()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_picture_is_turned_upright(tmp_path: Path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what is left in the file is on top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = pixels(write_shard(tmp_path, image="a.jpg")["jpg"])
    assert found.shape == (16, 8, 3)
    assert np.abs(found[:6] - [255, 0, 0]).max() <= 8
    assert np.abs(found[-6:] - [0, 0, 255]).max() <= 8


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path):
    Image.fromarray(np.full((20, 40), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    assert np.unique(pixels(write_shard(tmp_path, image="a.png")["png"])).tolist() == [100]


def test_an_mp3_passes_or_becomes_flac(tmp_path: Path):
    soundfile.write(tmp_path / "a.mp3", np.sin(np.arange(8000) / 9), 8000)
    assert write_shard(tmp_path, ShardOptions(workers=1), audio="a.mp3")["mp3"] == (tmp_path / "a.mp3").read_bytes()
    data = Encoder(tmp_path, MediaOptions(audio_rate=4000)).media("audio", "a.mp3").data
    assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(1, abs=0.1)


def flac(total: int) -> bytes:
    """A second of noise at 8 kHz whose STREAMINFO states ``total`` samples (36 bits, from bit 172)."""
    data = bytearray(audio_bytes(np.random.default_rng(0).uniform(-0.5, 0.5, 8000), "FLAC", rate=8000))
    fields = int.from_bytes(data[18:26], "big")
    assert fields % 2**36 == 8000
    data[18:26] = (fields - 8000 + total).to_bytes(8, "big")
    return bytes(data)


NOISE = np.random.default_rng(0)
DAMAGED = {
    "long.flac": flac(2**36 - 1),
    "cut.flac": flac(8000)[:5000],
    "cut.png": image_bytes(Image.fromarray(NOISE.integers(0, 255, (40, 40, 3), np.uint8)))[:2000],
    "float.png": image_bytes(Image.new("F", (4, 4)), "TIFF"),  # which the codec does not read either
}


@pytest.mark.parametrize(("image_size", "audio_rate"), [(None, None), (16, 4000)])
def test_damaged_files_are_counted_and_skipped(tmp_path: Path, caplog, image_size, audio_rate):
    options = ShardOptions(
        media=MediaOptions(image_size=image_size, audio_rate=audio_rate), workers=1, max_bad_fraction=0.9
    )
    rows = [Row(key="good", text="t", split="train")]
    for name, data in DAMAGED.items():
        (tmp_path / name).write_bytes(data)
        where = {"image": name} if name.endswith("png") else {"audio": name}
        rows.append(Row(key=name.replace(".", "-"), text="t", split="train", **where))
    report = shard_rows(rows, tmp_path, tmp_path / "out", options)
    bad = {name.replace(".", "-") for name in DAMAGED}
    assert {skipped.key for skipped in report.skipped} == bad
    assert all(f"skipped {key}: " in caplog.text for key in bad)
    skipped = (tmp_path / "out/skipped.jsonl").read_text()
    assert {json.loads(line)["key"] for line in skipped.splitlines()} == bad
    assert "object at 0x" not in skipped  # the same input gives the same bytes
    assert report.shards["train"][0]["nsamples"] == 1


def ramp(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Grey that grows from left to right, from 0 to 250."""
    row = np.linspace(0, 250, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy()).convert(mode)


def encode(data: bytes, name: str = "a", **options: Any) -> Media:
    return member("image", name, data, MediaOptions(**options))


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes(image, "JPEG", exif=exif)


JPEG, LOSSLESS_WEBP = image_bytes(ramp(40, 20), "JPEG"), image_bytes(ramp(40, 20), "WEBP", lossless=True)
ANIMATED = image_bytes(ramp(40, 20), "WEBP", save_all=True, append_images=[ramp(40, 20).rotate(180)], lossless=True)


@pytest.mark.parametrize(
    ("data", "options", "found"),
    [
        (JPEG, {"image_size": 10}, "JPEG"),
        (image_bytes(ramp(40, 20), "WEBP"), {"image_size": 10}, "JPEG"),
        (LOSSLESS_WEBP, {"image_size": 10}, "PNG"),
        (ANIMATED, {"image_size": 10}, "PNG"),
        (image_bytes(ramp(40, 20), "GIF"), {"image_size": 10}, "PNG"),
        (image_bytes(ramp(40, 20), "TIFF", compression="jpeg"), {"image_size": 10}, "JPEG"),
        (LOSSLESS_WEBP, {"image_size": 10, "image_format": "keep"}, "WEBP"),
        (image_bytes(ramp(40, 20), "BMP"), {"crop": True, "image_format": "keep"}, "PNG"),
        (image_bytes(ramp(40, 20)), {"image_format": "jpeg"}, "JPEG"),
        (JPEG, {"image_format": "webp"}, "WEBP"),
        (turned(ramp(40, 20)), {"image_size": 40}, "JPEG"),  # small enough, and turned upright
        (image_bytes(ramp(40, 20, "CMYK"), "JPEG"), {"image_size": 40}, "JPEG"),
        (image_bytes(ramp(40, 20)), {"image_size": 40}, "PNG"),
        (JPEG, {}, None),
        (JPEG, {"image_format": "keep"}, None),
        (JPEG, {"image_format": "jpeg"}, None),
        (JPEG, {"image_size": 40}, None),  # a further encoding would lose
        (JPEG, {"image_size": 20, "image_side": "shortest"}, None),
        (image_bytes(ramp(20, 20), "JPEG"), {"crop": True}, None),
    ],
)
def test_the_format_of_an_image_follows_its_source_and_the_options(
    data: bytes, options: dict[str, Any], found: str | None
) -> None:
    media = encode(data, **options)
    assert (media.facts["width"], media.facts["height"]) in ((40, 20), (20, 40), (20, 20))
    if found is None:
        assert media.data is data
    else:
        with Image.open(io.BytesIO(media.data)) as image:
            assert (image.format, image.mode) == (found, "RGB")
            assert image.getexif().get(0x0112, 1) == 1
        assert {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[found] == media.suffix
        assert media.data is not data


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((400, 200), {"image_size": 100}, (100, 50)),
        ((400, 200), {"image_size": 100, "image_side": "shortest"}, (200, 100)),
        ((200, 400), {"image_size": 100, "image_side": "shortest"}, (100, 200)),
        ((301, 17), {"image_size": 100}, (100, 6)),  # 5.6
        ((1000, 2), {"image_size": 100}, (100, 1)),  # not 0
        ((400, 200), {"crop": True}, (200, 200)),
        ((400, 200), {"crop": True, "image_size": 100}, (100, 100)),
        ((40, 20), {"crop": True, "image_size": 100}, (20, 20)),  # nothing is enlarged
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_is_shrunk_and_cropped_about_its_centre(
    size: tuple[int, int], options: dict[str, Any], expected: tuple[int, int], form: str
) -> None:
    found = pixels(encode(image_bytes(ramp(*size), form), image_format="png", **options).data)
    assert found.shape[1::-1] == expected
    share = size[1] / size[0] if options.get("crop") else 1.0  # of the width
    ends = 125 * (1 - share), 125 * (1 + share)
    step = 250 * share / expected[0]
    assert np.abs(found[0, [0, -1], 0] - ends).max() <= step + 2


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_a_large_jpeg_is_shrunk_from_a_smaller_scale_without_a_shift(options: dict[str, Any]) -> None:
    data = image_bytes(ramp(803, 607), "JPEG", **options)  # no multiple of 8
    found = pixels(encode(data, image_size=100).data)
    assert found.shape == (76, 100, 3)
    exact = 250 * ((np.arange(100) + 0.5) * 8.03 - 0.5) / 802 - 0.5  # of the centres of pixels, rounded down
    error = found.mean(axis=(0, 2)) - exact
    assert abs(error.mean()) < 0.3  # a pixel of the file is 0.31
    assert np.abs(error).max() < 1.5


def test_the_content_decides_the_suffix() -> None:
    assert encode(JPEG, "a.JPEG").suffix == "jpeg"
    assert encode(JPEG, "a.png").suffix == "jpg"
    assert encode(JPEG, "photo").suffix == "jpg"
    clip = audio_bytes(np.zeros(800), "OGG", "OPUS", rate=8000)
    assert member("audio", "a.mp3", clip, MediaOptions()).suffix == "opus"
    assert member("audio", "a.oga", clip, MediaOptions()).suffix == "oga"


STEREO = np.stack([np.sin(np.arange(22050) / 20), np.zeros(22050)], axis=1) / 2


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"audio_format": "opus"}, ("OGG", 24_000, 1)),  # Opus has no 22.05 kHz
        ({"audio_format": "opus", "audio_rate": 8000}, ("OGG", 8000, 1)),
        ({"audio_format": "wav", "audio_channels": "keep"}, ("WAV", 22050, 2)),
        ({"audio_channels": "1"}, ("FLAC", 22050, 1)),
        ({"audio_rate": 16_000}, ("FLAC", 16_000, 1)),
        ({"audio_rate": 16_000, "audio_channels": "keep"}, ("FLAC", 16_000, 2)),
        ({"audio_channels": "keep"}, None),
        ({"audio_format": "wav"}, None),
    ],
)
def test_a_clip_is_mixed_resampled_and_encoded(options: dict[str, Any], found: tuple[str, int, int] | None) -> None:
    data = audio_bytes(STEREO, "WAV", rate=22050)
    media, again = (member("audio", "a.wav", data, MediaOptions(**options)) for _ in range(2))
    assert media.data == again.data
    if found is None:
        assert media.data is data
        return
    with open_audio(media.data) as file:
        assert (file.format, file.samplerate, file.channels) == found
        wave = file.read(always_2d=True)
    assert len(wave) / found[1] == pytest.approx(1, abs=1e-3)
    loudness = 0.5 / 2**0.5 / (1 if found[2] == 2 else 2)  # a sine in one of two channels
    assert np.sqrt((wave[:, 0] ** 2).mean()) == pytest.approx(loudness, rel=0.05)


def test_an_opus_clip_that_needs_no_change_is_not_encoded_again() -> None:
    data = audio_bytes(np.zeros(800), "OGG", "OPUS", rate=8000)
    same = MediaOptions(audio_format="opus", audio_rate=8000)
    assert member("audio", "a.opus", data, same).data is data
    assert member("audio", "a.opus", data, MediaOptions(audio_format="opus", audio_rate=16_000)).data != data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"audio_format": "opus", "audio_rate": 22050}, "--audio-rate 22050 is none that Opus has.*24000"),
        ({"image_format": "gif"}, "--image-format gif is none of auto, keep, jpeg"),
        ({"image_side": "width"}, "--image-side width"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MediaOptions(**options)


def test_encoded_images_are_kept_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20)).save(tmp_path / name)
    whole, small = (Encoder(tmp_path, MediaOptions(image_size=size)) for size in (None, 16))
    assert whole.media("image", "a.png") is not whole.media("image", "a.png")
    kept = small.media("image", "a.png")
    assert small.media("image", "a.png") is kept
    monkeypatch.setattr(encoding, "KEPT_BYTES", len(kept.data))
    small.media("image", "b.png")
    assert small.media("image", "a.png") is not kept


def test_a_worker_that_encodes_images_loads_no_torch(tmp_path: Path) -> None:
    """It takes a second and 180 MB."""
    (tmp_path / "a.png").write_bytes(image_bytes(ramp(20, 10)))
    (tmp_path / "a.npy").touch()
    script = """
import sys
from pathlib import Path
from mmmoe_pretrain.data_prep import cli
from mmmoe_pretrain.data_prep.rows.row import row_of
from mmmoe_pretrain.data_prep.shards.encode import Encoder, EncodedSample, MediaOptions
row = row_of({"key": "a", "image": "a.png", "series": "a.npy", "text": "a", "other": 1})
sample = Encoder(Path(sys.argv[1]), MediaOptions(image_size=8))(row)
assert isinstance(sample, EncodedSample), sample
assert sorted(sample.members) == ["json", "npy", "png", "txt"] and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=60)


def test_an_image_that_takes_too_much_memory_is_broken(tmp_path: Path) -> None:
    """In a new process: one that other tests have run in may hold as much memory already."""
    Image.new("RGB", (5000, 5000)).save(tmp_path / "large.png", compress_level=1)  # 100 MB in memory
    Image.new("RGB", (500, 500)).save(tmp_path / "small.png")
    script = """if True:
        import sys
        from pathlib import Path
        from mmmoe_pretrain.data_prep.rows.row import Row
        from mmmoe_pretrain.data_prep.shards import encode
        from mmmoe_pretrain.data_prep.shards.media import MediaOptions
        encode.DECODER_BYTES = 16 << 20
        encoder = encode.Encoder(Path(sys.argv[1]), MediaOptions())
        large, small = (encoder(Row(key="a", image=name)) for name in ("large.png", "small.png"))
        assert isinstance(large, encode.BadSample), large
        assert large.reason == "large.png takes more than 16 MiB of memory to be decoded; leave it out"
        assert isinstance(small, encode.EncodedSample)
    """
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=60)
