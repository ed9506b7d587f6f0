"""What is damaged: small whole inputs of every format, some made here and some of the mini corpus."""

from __future__ import annotations

import csv
import functools
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import yaml
from PIL import Image
from pyarrow import parquet

from tests.support import RATE, npy_bytes, tiny_values, write_tokenizer
from tests.support import audio_bytes as sound
from tests.support import image_bytes as saved

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "assets" / "mini" / "mini.tar"


@functools.cache
def images() -> dict[str, tuple[bytes, ...]]:
    """By format."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    rgb = Image.fromarray(np.kron(pixels[:6, :5], np.ones((4, 4, 1), np.uint8)))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    indexed = rgb.quantize(16)
    wide = Image.fromarray((np.arange(480).reshape(24, 20) * 100).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [alpha, rgb], "duration": 10}
    return {
        "png": (saved(rgb, "PNG"), saved(alpha, "PNG"), saved(indexed, "PNG", transparency=0), saved(wide, "PNG"),
                saved(rgb.convert("1"), "PNG"), *_mini(".png", 3)),
        "jpeg": (saved(rgb, "JPEG"), saved(rgb, "JPEG", progressive=True), saved(rgb, "JPEG", exif=turned),
                 saved(rgb.convert("CMYK"), "JPEG"), saved(rgb.convert("L"), "JPEG")),
        "webp": (saved(rgb, "WEBP"), saved(alpha, "WEBP", lossless=True), saved(rgb, "WEBP", exif=turned),
                 saved(alpha, "WEBP", **frames)),
        "gif": (saved(indexed, "GIF"), saved(indexed, "GIF", transparency=1), saved(indexed, "GIF", **frames)),
        "bmp": (saved(rgb, "BMP"), saved(indexed, "BMP"), saved(rgb.convert("1"), "BMP")),
        "tiff": (saved(rgb, "TIFF"), saved(rgb, "TIFF", compression="jpeg"), saved(wide, "TIFF"),
                 saved(alpha, "TIFF", compression="tiff_lzw"), saved(indexed, "TIFF", compression="packbits")),
    }  # fmt: skip


@functools.cache
def clips() -> dict[str, tuple[bytes, ...]]:
    """By format."""
    time = np.arange(RATE // 4) / RATE
    mono = 0.3 * np.sin(2 * np.pi * 300 * time)
    stereo = np.stack([mono, -mono], axis=1)
    wavs = [sound(mono, "WAV", kind) for kind in ("PCM_16", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")]
    return {
        "wav": (*wavs, sound(stereo, "WAV", "PCM_24"), sound(mono, "WAVEX", "PCM_16")),
        "flac": (sound(mono, "FLAC", "PCM_16"), sound(stereo, "FLAC", "PCM_24"), *_mini(".flac", 2)),
        "ogg": (
            sound(mono, "OGG", "VORBIS"),
            sound(stereo, "OGG", "VORBIS"),
            sound(mono, "OGG", "OPUS"),
        ),
        "mp3": (sound(mono, "MP3", "MPEG_LAYER_III"), sound(stereo, "MP3", "MPEG_LAYER_III")),
    }


@functools.cache
def series() -> dict[str, tuple[bytes, ...]]:
    """Of two channels, by format."""
    steps = np.random.default_rng(0).normal(size=(2, 30))
    gaps = np.where(steps > 1, np.nan, steps)
    arrays = (steps, gaps.astype(np.float32), np.asfortranarray(steps), (9 * steps).astype(np.int16))
    lines = ["\n".join(",".join(map(str, row)) for row in array.T) for array in (steps, gaps)]
    return {"npy": tuple(map(npy_bytes, arrays)), "csv": tuple(line.encode() for line in lines)}


def document() -> dict[str, bytes]:
    """The members of one that holds every kind."""
    parts = [
        {"text": "red number 1"}, {"member": "0.png"}, {"text": "", "loss": False}, {"member": "1.wav"},
        {"member": "2.npy", "modality": "sensors"}, {"member": "3.txt"}, {"member": "0.png", "loss": False},
    ]  # fmt: skip
    meta = {"group": "g", "label": "red", "parts": parts}
    return {"0.png": images()["png"][0], "1.wav": clips()["wav"][0], "2.npy": series()["npy"][0],
            "3.txt": b"blue number 2", "json": json.dumps(meta).encode()}  # fmt: skip


@functools.cache
def tokenizer() -> bytes:
    """A sentencepiece model."""
    with tempfile.TemporaryDirectory() as folder:
        return write_tokenizer(Path(folder) / "tokens.model").read_bytes()


def samples() -> list[tuple[str, dict[str, bytes]]]:
    """Keys and members of a small shard: every format once."""
    image, audio = images(), clips()
    meta = json.dumps({"group": "g", "label": "red", "language": "en", "split": "train"}).encode()
    return [
        ("one", {"png": image["png"][0], "wav": audio["wav"][0], "txt": b"red number 1", "json": meta}),
        ("two", {"jpg": image["jpeg"][0], "flac": audio["flac"][0], "txt": b"blue number 2", "json": meta}),
        ("three", {"webp": image["webp"][0], "ogg": audio["ogg"][0], "json": meta}),
        ("four", {"txt": "Красный 4".encode(), "mp3": audio["mp3"][0]}),
        ("five", document()),
    ]


@functools.cache
def shards() -> tuple[bytes, ...]:
    """Tars of ``samples`` in the three dialects; the last two have records of their own for long names."""
    return (
        _tar(tarfile.USTAR_FORMAT, ""), _tar(tarfile.GNU_FORMAT, ""),
        _tar(tarfile.PAX_FORMAT, "ü" * 60), _tar(tarfile.GNU_FORMAT, "folder/" + "n" * 120),
    )  # fmt: skip


@functools.cache
def zips() -> tuple[bytes, ...]:
    """Archives of a folder with images, sidecars and clips: stored, deflated, and in one more folder."""
    files = {"red/0.png": images()["png"][0], "red/0.txt": b"A red square.", "blue/1.jpg": images()["jpeg"][0],
             "blue/1.json": b'{"caption": "Blue."}', "blue/ü 2.wav": clips()["wav"][0]}  # fmt: skip
    return tuple(
        _zip({prefix + name: data for name, data in files.items()}, method)
        for method, prefix in ((zipfile.ZIP_STORED, ""), (zipfile.ZIP_DEFLATED, ""), (zipfile.ZIP_STORED, "around/"))
    )


def _zip(files: Mapping[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def tables() -> dict[str, bytes]:
    """The same rows in every format of tables."""
    rows = [
        {"id": "a", "image_path": "0.png", "caption": 'Red, or "red".', "score": 0.5},
        {"id": "b", "image_path": "1.jpg", "caption": "Синий\nover two lines", "score": 1.5},
        {"id": "c", "image_path": "0.png", "caption": "Third.", "score": None},
    ]  # fmt: skip
    found = {}
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        found[f"table.{suffix}"] = text.getvalue().encode()
    found["table.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    table = pyarrow.Table.from_pylist(
        [{**row, "image": {"bytes": images()["png"][0], "path": "0.png"}} for row in rows]
    )
    for compression in ("none", "zstd"):
        buffer = io.BytesIO()
        parquet.write_table(table.drop_columns("image_path"), buffer, compression=compression)
        found[f"{compression}.parquet"] = buffer.getvalue()
    return found


def config_text(root: Path) -> str:
    """A run's YAML, with anchors and a merge."""
    values = tiny_values(root)
    text = yaml.safe_dump(values, sort_keys=False)
    return text.replace("optimizer:", "optimizer: &anchor").replace("checkpoint:", "faults: {}\ncheckpoint:")


def _tar(format: int, prefix: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for key, members in samples():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{prefix}{key}.{suffix}")
                info.size = len(data)
                if format == tarfile.PAX_FORMAT:
                    info.mtime = 1.5  # a record of its own
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _mini(suffix: str, count: int) -> tuple[bytes, ...]:
    """The smallest files of the mini corpus."""
    with tarfile.open(MINI, "r:") as tar:
        found = sorted((m.size, m.name) for m in tar if m.name.endswith(suffix))[:count]
        files = [tar.extractfile(name) for _, name in found]
        return tuple(file.read() for file in files if file is not None)
