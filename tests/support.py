"""Small inputs made by hand: samples, shards, a tokenizer, and the config of a tiny run."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
from PIL import Image

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.moe.cpu.matmul import HAS_ONEDNN

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "grey": (120, 120, 120),
           "yellow": (240, 230, 40), "black": (10, 10, 10),
           "pink": (250, 150, 200), "brown": (120, 70, 20)}  # fmt: skip
RATE = 16_000


def things(count: int) -> list[dict[str, Any]]:
    """Rows whose colour, tone and name agree, so that there is something to learn."""
    names = list(COLOURS)
    return [{"key": f"thing-{i:03d}", "name": f"{names[i % 8]} number {i}",
             "colour": COLOURS[names[i % 8]], "hertz": 200.0 * (1 + i % 8), "group": f"g{i}",
             "label": names[i % 8]} for i in range(count)]  # fmt: skip


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of these names and contents, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, rows: list[dict[str, Any]], lacking: tuple[str, ...] = (), corrupt: tuple[str, ...] = ()
) -> Path:
    """One tar of PNG, WAV, text and JSON members, without the modalities in ``lacking``; the images
    of the keys in ``corrupt`` are broken."""
    members = []
    for row in rows:
        image = b"not an image" if row["key"] in corrupt else png_of(row)
        audio = audio_bytes(0.3 * np.sin(2 * np.pi * row["hertz"] * np.arange(RATE // 4) / RATE))
        content = {"image": ("png", image), "audio": ("wav", audio), "text": ("txt", row["name"].encode())}
        meta = {"group": row["group"], "label": row["label"], "language": row.get("language", "en"),
                "subset": "named", "audio_kind": "speech"}  # fmt: skip
        kept = [member for name, member in content.items() if name not in lacking]
        members += [(f"{row['key']}.{name}", data) for name, data in (*kept, ("json", json.dumps(meta).encode()))]
    write_tar(folder / "00000.tar", members)
    return folder


def png_of(row: dict[str, Any]) -> bytes:
    """An image in the row's colour; rows with one ``image_of`` have the same image."""
    rng = np.random.default_rng(zlib.crc32(row.get("image_of", row["key"]).encode()))
    pixels = np.clip(np.array(row["colour"]) + rng.integers(-20, 20, (16, 16, 3)), 0, 255)
    return image_bytes(Image.fromarray(pixels.astype(np.uint8)))


def image_bytes(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A file of this format."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def audio_bytes(wave: np.ndarray, form: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    """A file of this format and encoding."""
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_tokenizer(path: Path, vocab_size: int = 48, backwards: bool = False) -> Path:
    """A sentencepiece model over the names of ``things``."""
    texts = [row["name"][:: -1 if backwards else 1] for row in things(64)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), vocab_size=vocab_size,
        model_type="bpe", pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)  # fmt: skip
    return path


def tiny_values(root: Path, **sections: Any) -> dict[str, Any]:
    """The plain values of a tiny run under ``root``; sections given replace whole sections."""
    values: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(root / "runs"),
        "data": {"train": [{"path": str(root / "train")}], "tokenizer": str(root / "tokens.model"),
                 "num_workers": 0},
        "modalities": {"image": {"kind": "image", "size": 16, "stem_channels": 8},
                       "audio": {"kind": "audio", "max_seconds": 0.4, "stem_channels": 8},
                       "text": {"kind": "text", "max_tokens": 16}},
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 16,
                  "embedding_size": 8},
        "moe": {"num_experts": 4, "expert_hidden_size": 8,
                "losses": {"local_entropy": 0.01, "global_entropy": 0.01, "balance": 0.01, "z": 0.001}},
        "objectives": objectives(captioning={"fraction": 0.5}),
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch_size": 16, "num_microbatches": 2, "log_every": 1,
                  "heatmap_every": 1000},
        "checkpoint": {"every": 10},
    }  # fmt: skip
    values |= sections
    cpu = {"products": "onednn" if HAS_ONEDNN else "torch"}  # tests compare runs, so none may measure its own
    values["train"] = {"cpu": cpu, **values["train"]}
    reads_text = any(its.get("kind") == "text" for its in values["modalities"].values())
    return {**values, "model": {"vocab_size": 48 * reads_text, **values["model"]}}


AS_IT_IS: dict[str, Any] = {}


def objectives(
    contrastive: dict[str, Any] | None = AS_IT_IS, captioning: dict[str, Any] | None = AS_IT_IS
) -> dict[str, Any]:
    """The values of the section with both objectives, more of their settings, or without one (None)."""
    pairs = {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5}
    both = {
        "contrastive": (contrastive, {"kind": "contrastive", "pairs": pairs}),
        "captioning": (captioning, {"kind": "next_token", "parts": [["image", "audio"], "text"], "weight": 0.5}),
    }
    return {name: {**fixed, **more} for name, (more, fixed) in both.items() if more is not None}  # fmt: skip


def tiny_config(root: Path, **sections: Any) -> RunConfig:
    """``tiny_values`` as a config."""
    return run_config.parse(tiny_values(root, **sections))


def in_forks(*calls: Callable[[], object], seconds: float = 30.0) -> list[int | None]:
    """The exit codes of forked processes that do these at once; None of one that did not end in time."""
    forks = [multiprocessing.get_context("fork").Process(target=call, daemon=True) for call in calls]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(seconds)
    codes = [fork.exitcode for fork in forks]
    for fork in forks:
        fork.kill()
    return codes


BEGIN, END = 1, 2  # marks of a text
WORDS = ("red", "green", "blue", "grey", "yellow", "black", "pink", "brown")  # tests/assets/words.npz lacks the last
VECTORS = Path(__file__).parent / "assets" / "words.npz"  # of 8 numbers of noise


def random_sample(seed: int, has: str, config: RunConfig) -> Sample:
    """A sample of noise with the modalities whose first letters are in ``has``; texts are short."""
    rng = np.random.default_rng(seed)
    items = []
    for name, modality in build_modalities(config.modalities, decoding=False).items():
        if name[0] not in has:
            continue
        if modality.needs_tokenizer:
            raw = f"{WORDS[seed % 7]} {WORDS[seed % 5 + 3]}"
            value = np.asarray([BEGIN, *rng.integers(4, config.model.vocab_size, int(rng.integers(1, 8))), END])
        else:
            value, raw = modality.example(rng), ""
        items.append(Item(name, value, raw))
    return Sample(SampleMeta(key=f"sample-{seed}", group=f"g{seed}", subset="ab"[seed % 2]), tuple(items))


def pack_settings(config: RunConfig) -> PackSettings:
    """For samples that are decoded already: no tokenizer is read."""
    return PackSettings.from_config(config, build_modalities(config.modalities, decoding=False))


def random_batch(config: RunConfig, modalities: list[str], seed: int = 0) -> Batch:
    """Samples of noise, packed; e.g. ``["iat", "it", "a"]``."""
    samples = [random_sample(1000 * seed + i, has, config) for i, has in enumerate(modalities)]
    return pack(samples, pack_settings(config))


# Representations of two modalities, by their kind.
FUSED = {
    kind: {"kind": kind, "parts": ["image", "audio"], "missing": "allow"}
    for kind in ("early", "late", "gated", "tensor", "low_rank", "latents", "mult", "bottleneck")
}
FUSED["graph"] = {"kind": "graph", "parts": ["image", "audio"], "missing": "allow",
                  "edges": ["modality", "time", "similarity"]}  # fmt: skip
