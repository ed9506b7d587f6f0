"""What the damaged inputs are fed to. Each target makes an input from a generator, and uses it as the
project does; it returns "accepted" or "skipped" (a bad sample, counted), or raises what refuses it.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from data_prep import inspect as data_inspect
from data_prep import shard as data_shard
from data_prep import verify as data_verify
from data_prep.manifest import read_manifest
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import BadSample, Draws, decode
from mmmoe_pretrain.data.loader import keep_slot
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.shards import RawSample, ShardFolder
from mmmoe_pretrain.modalities import Modalities, Tokenizer, build_modalities
from tests.fuzz import checkpoints, inputs, logs
from tests.fuzz.mutate import BLIND, damage, damage_json
from tests.fuzz.yaml_bombs import damage_yaml
from tests.support import tiny_config, tiny_values

Outcome = tuple[str, str]
VOCAB = 48  # of the tokenizer


class Payload:
    """A pickle that would write ``marker`` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Workplace:
    """A folder, what of the project stands ready in it, and the file that only code in an input would write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "marker-of-code-that-ran"

    @cached_property
    def config(self) -> RunConfig:
        (self.folder / "tokens.model").write_bytes(inputs.tokenizer())
        modalities = tiny_values(self.folder)["modalities"]
        modalities["text"] |= {"dropout": 0.5, "label_probability": 0.1}
        modalities["sensors"] = {"kind": "series", "channels": 2, "max_steps": 20, "patch": 4}
        return tiny_config(self.folder, modalities=modalities)

    @cached_property
    def modalities(self) -> Modalities:
        return build_modalities(self.config.modalities, self.config.data.tokenizer)

    @cached_property
    def settings(self) -> PackSettings:
        return PackSettings.from_config(self.config, self.modalities)

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name

    def payload(self) -> bytes:
        return pickle.dumps(Payload(self.marker))


@dataclass(frozen=True)
class Target:
    """``names``: a refusal's message holds one of them. ``prepare`` runs once, in the parent."""

    name: str
    make: Callable[[Random, Workplace], Any]
    use: Callable[[Any, Workplace], Outcome]
    names: Callable[[Workplace], Sequence[str]]
    prepare: Callable[[Workplace], Any] = lambda place: place.settings
    refusals: tuple[type[Exception], ...] = (ValueError,)


def of_bytes(sources: Callable[[], Sequence[bytes]]) -> Callable[[Random, Workplace], bytes]:
    """One of ``sources``, damaged; now and then a pickle."""

    def make(rng: Random, place: Workplace) -> bytes:
        if rng.random() < 0.01:
            return place.payload()
        return damage(rng, rng.choice(sources()), rng.choice(sources()))

    return make


def decode_member(extension: str) -> Callable[[bytes, Workplace], Outcome]:
    """As the loader does: decode, perturbed and not, and pack."""

    def use(data: bytes, place: Workplace) -> Outcome:
        return decode_and_pack([RawSample("key", {extension: data})], place)

    return use


def decode_and_pack(raws: Sequence[RawSample], place: Workplace) -> Outcome:
    """Accepted if every sample could be used."""
    bad = []
    for seed in (None, 0):
        for start in range(0, len(raws), 8):
            found = [
                decode(raw, place.modalities, None if seed is None else Draws(seed, i), "a {}")
                for i, raw in enumerate(raws[start : start + 8])
            ]
            bad += [item for item in found if isinstance(item, BadSample)]
            for item in found:
                check_sample(item, place)
            pack([keep_slot(item) for item in found], place.settings)
    return ("skipped", f"{bad[0].key}: {bad[0].reason}") if bad else ("accepted", "")


def check_sample(item: Sample | BadSample, place: Workplace) -> None:
    """Accepted values have the expected shapes, and finite numbers."""
    if isinstance(item, BadSample):
        assert item.key and item.reason and len(item.reason) < 2000, item
        return
    assert item.items
    for held in item.items:
        modality = place.modalities[held.modality]
        count, like = modality.num_tokens(held.value), modality.example(np.random.default_rng(0), VOCAB)
        assert 0 < count <= modality.max_tokens
        assert held.value.dtype == like.dtype and held.value.ndim == like.ndim
        assert held.value.shape[:-1] == like.shape[:-1]  # all but what may be longer
        arrays = modality.collate([held.value]).arrays.values()
        assert all(np.isfinite(array).all() for array in arrays)
        assert (modality.keys(held.value) >= 0).all()
        assert (modality.keys(held.value) < (VOCAB if modality.predictable else count)).all()


def use_media(data: tuple[str, bytes, int | None], place: Workplace) -> Outcome:
    """``mmmoe-data shard`` of one row."""
    suffix, content, size = data
    folder = place.fresh("media")
    (folder / f"file.{suffix}").write_bytes(content)
    kind = "image" if suffix in inputs.images() else "audio"
    row = {"key": "row", kind: f"file.{suffix}", "text": "a text"}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    rows = read_manifest(folder)
    made = data_shard.encode_row(rows[0], folder, data_shard.ShardOptions(image_size=size, audio_rate=size and 8000))
    return ("skipped", made.reason) if isinstance(made, data_shard.BadSample) else ("accepted", "")


def make_media(rng: Random, place: Workplace) -> tuple[str, bytes, int | None]:
    files = {**{k: v for k, v in inputs.images().items() if k not in ("gif", "bmp")}, **inputs.clips()}
    suffix = rng.choice(sorted(files))
    return suffix, damage(rng, rng.choice(files[suffix]), rng.choice(files[suffix])), rng.choice((None, 16))


def make_meta(rng: Random, place: Workplace) -> dict[str, bytes]:
    members = dict(inputs.samples()[0][1])
    members["json"] = damage_json(rng, members["json"], members["txt"])
    if rng.random() < 0.3:
        members["txt"] = rng.choice(
            (damage(rng, members["txt"], b"\0"), b"\xef\xb7\xba" * 20_000, b"a" * 3_000_000, b"\0" * 999, b"\xff",
             "\ud800".encode("utf-8", "surrogatepass"), b"a " * 100_000, "\u0301".encode() * 50_000))  # fmt: skip
    return members


def make_document(rng: Random, place: Workplace) -> dict[str, bytes]:
    """One whose list of parts is damaged, or one of its members is away."""
    members = inputs.document()
    members["json"] = damage_json(rng, members["json"], members["3.txt"])
    if rng.random() < 0.1:
        del members[rng.choice(sorted(members))]
    return members


def use_shard(data: bytes, place: Workplace) -> Outcome:
    """A folder with one tar, and all its samples."""
    folder = place.fresh("shards")
    (folder / "00000.tar").write_bytes(data)
    return use_folder(folder, place)


def use_folder(folder: Path, place: Workplace) -> Outcome:
    shards = ShardFolder(folder, modalities=place.modalities)
    return decode_and_pack([shards.read(i) for i in range(len(shards))], place)


def make_sharded(place: Workplace) -> None:
    """A folder of whole shards with all sidecars, by ``mmmoe-data shard``'s own writer."""
    from data_prep.shard_files import EncodedSample, write_shard, write_shard_list

    (place.folder / "whole").mkdir()
    entries = []
    for number, (key, members) in enumerate(inputs.samples()):
        meta = {**json.loads(members.get("json", b"{}")), "key": key, "group": "", "split": "train"}
        members = {**members, "json": json.dumps(meta).encode()}
        entries.append(write_shard(place.folder / "whole" / f"{number:05d}.tar", [EncodedSample(key, members)]))
    write_shard_list(place.folder / "whole", entries)
    assert place.settings


def make_sidecar(names: Sequence[str]) -> Callable[[Random, Workplace], tuple[str, bytes]]:
    """One file of the whole folder, damaged."""

    def make(rng: Random, place: Workplace) -> tuple[str, bytes]:
        name = rng.choice(names)
        whole = (place.folder / "whole" / name).read_bytes()
        if rng.random() < 0.02:
            return name, place.payload()
        return name, (damage if name.endswith(".tar") else damage_json)(rng, whole, whole)

    return make


def changed_folder(data: tuple[str, bytes], place: Workplace) -> Path:
    folder = place.folder / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.folder / "whole", folder)
    (folder / data[0]).write_bytes(data[1])
    return folder


def use_verify(data: tuple[str, bytes], place: Workplace) -> Outcome:
    """``mmmoe-data verify``: damage is a problem in a list, not an end."""
    problems = list(data_verify.verify_folder(changed_folder(data, place), data_verify.Seen()))
    assert all(len(problem) < 4000 for problem in problems)
    return ("skipped", problems[0]) if problems else ("accepted", "")


def use_inspect(data: tuple[str, bytes], place: Workplace) -> Outcome:
    data_inspect.measure(changed_folder(data, place))
    return "accepted", ""


def make_manifest(rng: Random, place: Workplace) -> bytes:
    rows = [
        {"key": f"row-{i}", "image": "square.png", "audio": "tone.wav", "text": "A red square.", "split": "train",
         "language": "en", "group": "g"} for i in range(2)
    ]  # fmt: skip
    parts = [
        {"text": "A red square."},
        {"image": "square.png"},
        {"audio": "tone.wav", "loss": False},
        {"file": "a.csv"},
    ]
    rows.append({"key": "document", "parts": parts, "split": "train"})
    lines = [json.dumps(row).encode() for row in rows]
    at = rng.randrange(3)
    lines[at] = damage_json(rng, lines[at], lines[0])
    whole = b"\n".join(lines)
    return rng.choice(BLIND)(rng, whole, whole) if rng.random() < 0.1 else whole


def use_manifest(data: bytes, place: Workplace) -> Outcome:
    """``mmmoe-data shard``."""
    folder = place.fresh("manifest")
    (folder / "manifest.jsonl").write_bytes(data)
    (folder / "square.png").write_bytes(inputs.images()["png"][0])
    (folder / "tone.wav").write_bytes(inputs.clips()["wav"][0])
    (folder / "a.csv").write_bytes(inputs.series()["csv"][0])
    data_inspect.measure(folder)
    options = data_shard.ShardOptions(workers=1, max_bad_fraction=1.0)
    report = data_shard.shard_manifest(read_manifest(folder), folder, folder / "out", options)
    return ("skipped", report.skipped[0].reason) if report.skipped else ("accepted", "")


def use_config(data: tuple[bytes, list[str]], place: Workplace) -> Outcome:
    """``mmmoe train`` up to its config."""
    path = place.folder / "run.yaml"
    path.write_bytes(data[0])
    config = run_config.load(path, data[1])
    dumped, again = place.folder / "run.dumped.yaml", place.folder / "run.again.yaml"
    run_config.dump(config, dumped)
    run_config.dump(run_config.load(dumped), again)
    assert dumped.read_text() == again.read_text()  # values may be NaN in parallel.deepspeed, so not config == config
    return "accepted", ""


def make_config(rng: Random, place: Workplace) -> tuple[bytes, list[str]]:
    return damage_yaml(rng, inputs.config_text(place.folder), place.marker).encode("utf-8", "surrogatepass"), []


def make_override(rng: Random, place: Workplace) -> tuple[bytes, list[str]]:
    keys = (
        "train.steps", "moe.layers.1.num_experts", "data.train.0.path", "data.train.9.path", "data.train.²", "a..b",
        "name", "", ".", "train.steps.x", "objectives.contrastive.pairs.image-text", "parallel.deepspeed.a.b",
    )  # fmt: skip
    value = damage_yaml(rng, rng.choice(("1", "[1, 2]", "{a: 1}", "null")), place.marker)
    text = f"{rng.choice(keys)}{rng.choice(('=', '=', '=', '', '=='))}{value}"
    return inputs.config_text(place.folder).encode(), [text]


def use_tokenizer(data: bytes, place: Workplace) -> Outcome:
    path = place.folder / "damaged.model"
    path.write_bytes(data)
    tokenizer = Tokenizer(path)
    for text in ("red number 1", "Ünïcode ﬁ ½ 한국어", "\0\1", "x" * 300, ""):
        ids = tokenizer.encode(text, np.random.default_rng(0), 0.5)
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        tokenizer.decode(ids)
    return "accepted", ""


def _in(*names: str) -> Callable[[Workplace], Sequence[str]]:
    return lambda place: names


def make_tokenizer(rng: Random, place: Workplace) -> bytes:
    """A model file with bytes changed in place, which leaves most of its messages whole, or anything."""
    data = (place.folder / "tokens.model").read_bytes()
    if rng.random() < 0.3:
        return of_bytes(lambda: (data,))(rng, place)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30, 3000))):
        changed[rng.randrange(len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))
    return bytes(changed)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(Target(name, of_bytes(lambda name=name: inputs.images()[name]), decode_member("png"), _in("key"))
          for name in ("png", "jpeg", "webp", "gif", "bmp", "tiff")),
        *(Target(name, of_bytes(lambda name=name: inputs.clips()[name]), decode_member(name), _in("key"))
          for name in ("wav", "flac", "ogg", "mp3")),
        *(Target(name, of_bytes(lambda name=name: inputs.series()[name]), decode_member(name), _in("key"))
          for name in ("npy", "csv")),
        Target("document", make_document, lambda data, place: decode_and_pack([RawSample("key", data)], place),
               _in("key")),
        Target("media", make_media, use_media, _in("file.")),
        Target("member", make_meta, lambda data, place: decode_and_pack([RawSample("key", data)], place), _in("key")),
        Target("shard", of_bytes(inputs.shards), use_shard, _in("00000.tar")),
        Target("index", make_sidecar(("00000.index.json", "00001.index.json", "shards.json")),
               lambda data, place: use_folder(changed_folder(data, place), place),
               _in("index.json", "shards.json", ".tar"), make_sharded),
        Target("verify", make_sidecar(("00000.index.json", "shards.json", "00000.tar", "00001.tar")), use_verify,
               _in(), make_sharded, refusals=()),
        Target("inspect", make_sidecar(("00000.index.json", "shards.json", "00000.tar", "00001.tar")), use_inspect,
               _in("index.json", "shards.json", ".tar", "whole", "changed"), make_sharded),
        Target("manifest", make_manifest, use_manifest, _in("manifest.jsonl")),
        Target("config", make_config, use_config, _in("run.yaml")),
        Target("override", make_override, use_config, _in("run.yaml", "override")),
        Target("tokenizer", make_tokenizer, use_tokenizer, _in("damaged.model")),
        Target("log", logs.make, lambda data, place: logs.use(data, place.folder), _in(*logs.NAMES),
               lambda place: None),
        Target("checkpoint", lambda rng, place: checkpoints.make(rng, place.folder / "saved", place.payload()),
               lambda data, place: checkpoints.use(data, place.folder / "saved", place.folder / "changed"),
               _in(checkpoints.NAME, "latest"), lambda place: checkpoints.write(place.folder / "saved"),
               (ValueError, OSError)),
    )
}  # fmt: skip
