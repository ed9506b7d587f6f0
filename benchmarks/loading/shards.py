"""Shards for benchmarks/loader.py: photographs of 1 to 12 megapixels, the same at 256 pixels, and speech, each with a
text.

The photographs are those of two Debian packages of wallpapers (CC-BY-SA and similar, fetched, never committed), cut
at random and encoded as JPEG of quality 90 (4:2:0, as cameras do). Speech and texts are those of the corpus `mini` of
this repository: recordings joined to clips of 5 to 10 s, as FLAC.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import soxr
from PIL import Image

from mmmoe_pretrain.data_prep.corpora import mini
from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.shards.encode import EncodedSample
from mmmoe_pretrain.data_prep.shards.shard_files import write_shard, write_shard_list

PACKAGES = ("mate-backgrounds", "lomiri-wallpapers-20.04")
MEGAPIXELS = (1, 2, 3, 4, 6, 8, 12)
SHARDS, RATE, QUALITY = 4, 16_000, 90


def make(work: Path, samples: dict[str, int]) -> None:
    """Folders of shards with so many samples of each kind (photo, small, audio), and ``tokenizer.model``; what is
    there already is kept."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "mini" / "manifest.jsonl").is_file():
        mini.build(work / "mini")
    rows = [json.loads(line) for line in (work / "mini" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows if row.get("text")]
    if not (work / "tokenizer.model").is_file():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(work / "tokenizer"), vocab_size=1500, model_type="bpe",
            byte_fallback=True, pad_id=3, minloglevel=2,
        )  # fmt: skip
    makers = {
        "photo": lambda count: _photographs(work, count, texts),
        "small": lambda count: _small(work, count, texts),
        "audio": lambda count: _speech(work / "mini", rows, count, texts),
    }
    for kind, count in samples.items():
        folder = work / f"{kind}_{count}"
        if (folder / "shards.json").is_file():
            continue
        folder.mkdir(exist_ok=True)
        encoded = list(makers[kind](count))
        cut = np.array_split(np.arange(count), SHARDS)
        entries = [write_shard(folder / f"{i:05d}.tar", (encoded[j] for j in part)) for i, part in enumerate(cut)]
        write_shard_list(folder, entries)


def photographs(work: Path, count: int, megapixels: Sequence[int]) -> Iterator[bytes]:
    """JPEG files of these sizes in turn, cut from the wallpapers at random."""
    files = sorted(path for package in PACKAGES for path in fetch_debian(package, work)[0].rglob("*.jpg"))
    big = [path for path in files if np.prod(Image.open(path).size) > 1.2e6]
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.open(big[i % len(big)]).convert("RGB")
        share = rng.uniform(0.7, 1.0)
        wide, high = int(image.width * share), int(image.height * share)
        left, top = int(rng.integers(image.width - wide + 1)), int(rng.integers(image.height - high + 1))
        scale = (1e6 * megapixels[i % len(megapixels)] / (wide * high)) ** 0.5
        size = max(1, round(wide * min(1.0, scale))), max(1, round(high * min(1.0, scale)))
        yield _jpeg(image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high)))


def _photographs(work: Path, count: int, texts: list[str]) -> Iterator[EncodedSample]:
    for i, data in enumerate(photographs(work, count, MEGAPIXELS)):
        yield _with_text(i, "jpg", data, texts)


def _small(work: Path, count: int, texts: list[str]) -> Iterator[EncodedSample]:
    for sample in _photographs(work, count, texts):
        image = Image.open(io.BytesIO(sample.members["jpg"]))
        scale = 256 / min(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        yield EncodedSample(sample.key, {**sample.members, "jpg": _jpeg(small)})


def _speech(folder: Path, rows: list[dict[str, str]], count: int, texts: list[str]) -> Iterator[EncodedSample]:
    files = [folder / row["audio"] for row in rows if row.get("audio")]
    rng = np.random.default_rng(1)
    for i in range(count):
        wanted, parts = int(rng.uniform(5, 10) * RATE), [np.zeros(0, dtype=np.float32)]
        while sum(map(len, parts)) < wanted:
            wave, rate = soundfile.read(files[int(rng.integers(len(files)))], dtype="float32", always_2d=True)
            parts.append(soxr.resample(wave.mean(1), rate, RATE))
        file = io.BytesIO()
        soundfile.write(file, np.concatenate(parts)[:wanted], RATE, format="FLAC")
        yield _with_text(i, "flac", file.getvalue(), texts)


def _with_text(i: int, extension: str, data: bytes, texts: list[str]) -> EncodedSample:
    return EncodedSample(f"{i:06d}", {extension: data, "txt": texts[i % len(texts)].encode()})


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()
