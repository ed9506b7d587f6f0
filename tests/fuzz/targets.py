"""What the damaged inputs are fed to. Each target makes an input from a generator, and uses it as the
project does; it returns "accepted" or "skipped" (a bad sample, counted), or raises what refuses it.

Most targets read a folder, one file of which is damaged; ``folders.py`` writes and reads them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import BadSample, Draws, decode, keep_slot
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.fuzz import folders, inputs
from tests.fuzz.mutate import damage, damage_file, damage_json, damage_yaml, payload
from tests.support import tiny_config, tiny_values

Outcome = tuple[str, str]
VOCAB = 48  # of the tokenizer


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


@dataclass(frozen=True)
class Target:
    """``names``: a refusal's message holds one of them. ``prepare`` runs once, in the parent."""

    name: str
    make: Callable[[Random, Workplace], Any]
    use: Callable[[Any, Workplace], Outcome]
    names: tuple[str, ...]
    prepare: Callable[[Workplace], Any] = lambda place: place.settings
    refusals: tuple[type[Exception], ...] = (ValueError,)


def of_folder(
    name: str,
    write: Callable[[Path], None],
    files: str,
    read: Callable[[Path], Outcome | None],
    names: tuple[str, ...],
    refusals: tuple[type[Exception], ...] = (ValueError,),
) -> Target:
    """A folder as ``write`` makes it, of which a file of the pattern ``files`` is damaged. ``read`` gets the path of
    that file; it returns None where nothing is wrong."""

    def prepare(place: Workplace) -> None:
        (place.folder / "whole").mkdir()
        write(place.folder / "whole")

    def make(rng: Random, place: Workplace) -> tuple[Path, bytes]:
        path = rng.choice(sorted(path for path in (place.folder / "whole").glob(files) if path.is_file()))
        return path.relative_to(place.folder / "whole"), damage_file(rng, path, place.marker)

    def use(data: tuple[Path, bytes], place: Workplace) -> Outcome:
        changed = place.folder / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(place.folder / "whole", changed)
        (changed / data[0]).write_bytes(data[1])
        return read(changed / data[0]) or ("accepted", "")

    return Target(name, make, use, names, prepare, refusals)


def of_shards(name: str, write: Callable[[Path], None], files: str, names: tuple[str, ...]) -> Target:
    """The samples of a folder of shards."""
    target = of_folder(name, write, files, lambda path: None, names)

    def use(data: tuple[Path, bytes], place: Workplace) -> Outcome:
        target.use(data, place)
        folder = (place.folder / "changed" / data[0]).parent
        return decode_and_pack(folders.read_shards(folder, place.modalities), place)

    def prepare(place: Workplace) -> None:
        target.prepare(place)
        assert place.settings

    return Target(name, target.make, use, names, prepare)


def of_bytes(name: str, extension: str, sources: Callable[[], Sequence[bytes]]) -> Target:
    """A sample of one member, one of ``sources``, damaged; now and then a pickle."""

    def make(rng: Random, place: Workplace) -> dict[str, bytes]:
        if rng.random() < 0.01:
            return {extension: payload(place.marker)}
        return {extension: damage(rng, rng.choice(sources()), rng.choice(sources()))}

    return Target(name, make, decode_members, ("key",))


def decode_members(members: dict[str, bytes], place: Workplace) -> Outcome:
    return decode_and_pack([RawSample("key", members)], place)


def decode_and_pack(raws: Sequence[RawSample], place: Workplace) -> Outcome:
    """As the loader does: decode, perturbed and not, and pack. Accepted if every sample could be used."""
    bad = []
    for draws, start in itertools.product((False, True), range(0, len(raws), 8)):
        found = [
            decode(raw, place.modalities, Draws(0, i) if draws else None, "a {}")
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


def make_meta(rng: Random, place: Workplace) -> dict[str, bytes]:
    members = dict(inputs.samples()[0][1])
    members["json"] = damage_json(rng, members["json"])
    if rng.random() < 0.3:
        members["txt"] = rng.choice(
            (damage(rng, members["txt"], b"\0"), b"\xef\xb7\xba" * 20_000, b"a" * 3_000_000, b"\0" * 999, b"\xff",
             "\ud800".encode("utf-8", "surrogatepass"), b"a " * 100_000, "\u0301".encode() * 50_000))  # fmt: skip
    return members


def make_document(rng: Random, place: Workplace) -> dict[str, bytes]:
    """One whose list of parts is damaged, or one of its members is away."""
    members = inputs.document()
    members["json"] = damage_json(rng, members["json"])
    if rng.random() < 0.1:
        del members[rng.choice(sorted(members))]
    return members


def make_override(rng: Random, place: Workplace) -> str:
    keys = (
        "train.steps", "moe.layers.1.num_experts", "data.train.0.path", "data.train.9.path", "data.train.²", "a..b",
        "name", "", ".", "train.steps.x", "objectives.contrastive.pairs.image-text", "parallel.deepspeed.a.b",
    )  # fmt: skip
    value = damage_yaml(rng, rng.choice(("1", "[1, 2]", "{a: 1}", "null")), place.marker)
    return f"{rng.choice(keys)}{rng.choice(('=', '=', '=', '', '=='))}{value}"


def use_override(override: str, place: Workplace) -> Outcome:
    folders.write_config(place.folder)
    folders.read_config(place.folder / "run.yaml", [override])
    return "accepted", ""


SIDECARS = ("shards.index", "shards.json", ".tar")
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(of_bytes(name, "png", lambda name=name: inputs.images()[name])
          for name in ("png", "jpeg", "webp", "gif", "bmp", "tiff")),
        *(of_bytes(name, name, lambda name=name: inputs.clips()[name]) for name in ("wav", "flac", "ogg", "mp3")),
        *(of_bytes(name, name, lambda name=name: inputs.series()[name]) for name in ("npy", "csv")),
        Target("document", make_document, decode_members, ("key",)),
        Target("member", make_meta, decode_members, ("key",)),
        of_folder("media", folders.write_media, "file*", folders.read_media, ("file",)),
        of_shards("shard", folders.write_tars, "*/00000.tar", ("00000.tar",)),
        of_shards("index", folders.write_shards, "shards.*", SIDECARS),
        of_folder("energon", folders.write_energon, ".nv-meta/*", folders.read_energon, (".nv-meta", "changed")),
        of_folder("verify", folders.write_shards, "*", folders.verify, (), ()),
        of_folder("inspect", folders.write_shards, "*", folders.inspect, (*SIDECARS, "changed")),
        of_folder("dedup", folders.write_tars, "*/00000.tar", folders.dedup, ("00000.tar",)),
        of_folder("manifest", folders.write_manifest, "manifest.jsonl", folders.read_manifest_of,
                  ("manifest.jsonl", "every sample is broken: row")),
        of_folder("zip", folders.write_zips, "*.zip", folders.read_input, (".zip",)),
        of_folder("table", folders.write_tables, "table.*", folders.read_input, ("table.",)),
        of_folder("parquet", folders.write_tables, "*.parquet", folders.read_input, (".parquet",)),
        of_folder("sidecar", folders.write_sidecars, "*/*", folders.read_input, ("changed",)),
        of_folder("config", folders.write_config, "run.yaml", folders.read_config, ("run.yaml",)),
        Target("override", make_override, use_override, ("run.yaml", "override")),
        of_folder("tokenizer", folders.write_tokenizer, "*.model", folders.read_tokenizer, ("tokens.model",)),
        of_folder("log", folders.write_logs, "*", folders.read_log, tuple(folders.LOGS)),
        of_folder("checkpoint", folders.write_checkpoint, "**/*", folders.read_checkpoint,
                  (folders.CHECKPOINT, "latest"), (ValueError, OSError)),
    )
}  # fmt: skip
