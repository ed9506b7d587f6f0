"""Images and audio that are unusual or damaged, on their way into a shard."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep import media
from data_prep.manifest import Row
from data_prep.shard import ShardOptions, shard_manifest
from tests.support import audio_bytes, image_bytes

SMALL = ShardOptions(image_size=16, audio_rate=4000, workers=1)


def write_shard(folder: Path, options: ShardOptions = SMALL, **paths: str) -> dict[str, bytes]:
    """The members of the one sample that has these files."""
    row = Row(key="a", text="t", split="train", **paths)
    shard_manifest([row], folder, folder / "out", options)
    with tarfile.open(folder / "out/train/00000.tar") as tar:
        return {name.split(".")[1]: tar.extractfile(name).read() for name in tar.getnames()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_picture_is_turned_upright(tmp_path: Path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what is left in the file is on top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = pixels(write_shard(tmp_path, image="a.jpg")["png"])
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
    data = media.audio_member(tmp_path / "a.mp3", 4000).data
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
    options = ShardOptions(image_size=image_size, audio_rate=audio_rate, workers=1, max_bad_fraction=0.9)
    rows = [Row(key="good", text="t", split="train")]
    for name, data in DAMAGED.items():
        (tmp_path / name).write_bytes(data)
        where = {"image": name} if name.endswith("png") else {"audio": name}
        rows.append(Row(key=name.replace(".", "-"), text="t", split="train", **where))
    report = shard_manifest(rows, tmp_path, tmp_path / "out", options)
    bad = {name.replace(".", "-") for name in DAMAGED}
    assert {skipped.key for skipped in report.skipped} == bad
    assert all(f"skipped {key}: " in caplog.text for key in bad)
    skipped = (tmp_path / "out/skipped.jsonl").read_text()
    assert {json.loads(line)["key"] for line in skipped.splitlines()} == bad
    assert "object at 0x" not in skipped  # the same input gives the same bytes
    assert report.shards["train"][0]["nsamples"] == 1


def test_only_shrunk_pictures_are_kept_in_memory(tmp_path: Path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    media.shrunk_image_member.cache_clear()
    media.member("image", tmp_path / "a.png", None, None)
    assert media.shrunk_image_member.cache_info().currsize == 0
    first, again = (media.member("image", tmp_path / "a.png", 16, None) for _ in range(2))
    assert first is again
