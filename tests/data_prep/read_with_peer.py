"""What a library of others reads of a folder of shards: ``python read_with_peer.py NAME DIR``.

A script that reads no module of this project, so that it runs in the library's own environment. Its last line is
JSON: split -> [[key, {member: digest of its bytes}], ...] in the order in which the library gives the samples.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = dict[str, list[tuple[str, dict[str, Any]]]]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Of the members that hold bytes."""
    return {name: digest(data) for name, data in sample.items() if isinstance(data, bytes)}


def tars(folder: Path) -> dict[str, list[str]]:
    """Split -> its tars."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.tar")):
        found.setdefault(path.parent.name, []).append(str(path))
    return found


def webdataset(folder: Path) -> Found:
    """Raw bytes; and every sample is decoded once."""
    import webdataset as wds

    for urls in tars(folder).values():
        for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pilrgb"):
            assert isinstance(sample["json"], dict), sample
            assert "png" not in sample or sample["png"].size == (40, 20), sample
            assert "txt" not in sample or isinstance(sample["txt"], str), sample
    return {
        split: [(s["__key__"], digests(s)) for s in wds.WebDataset(urls, shardshuffle=False, empty_check=False)]
        for split, urls in tars(folder).items()
    }


def wids(folder: Path) -> Found:
    """By ``shards.json``, in any order."""
    from wids import ShardListDataset

    found: Found = {}
    for split in tars(folder):
        data = ShardListDataset(
            str(folder / split / "shards.json"), transformations=[], cache_dir=str(folder.parent / "wids")
        )
        samples = [data[i] for i in reversed(range(len(data)))][::-1]
        found[split] = [
            (s["__key__"], {k[1:]: digest(f.read()) for k, f in s.items() if k.startswith(".")}) for s in samples
        ]
    return found


def datasets(folder: Path) -> Found:
    """``load_dataset(DIR)`` by the folder's README, at once and as a stream; its split is ``validation``."""
    from datasets import Audio, Features, Image, load_dataset

    # It imports torchcodec, which wants FFmpeg's libraries on the machine, even where audio passes as bytes.
    Audio.encode_example = lambda self, value: value  # type: ignore[method-assign]
    options = {"path": str(folder), "cache_dir": str(folder.parent / "hf_cache")}
    whole, streamed, found = load_dataset(**options), load_dataset(**options, streaming=True), {}
    for split, data in whole.items():
        assert {image.size for image in data["png"] if image} <= {(40, 20)}
        assert [row["__key__"] for row in streamed[split].decode(False)] == data["__key__"][:]
        media = {name: type(kind) for name, kind in data.features.items() if isinstance(kind, Image | Audio)}
        data = data.cast(Features({**data.features, **{name: kind(decode=False) for name, kind in media.items()}}))
        found[{"validation": "val"}.get(split, split)] = [_members(row) for row in data]
    return found


def _members(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of a row of `datasets`. Its JSON has the fields that are columns, with null where a row lacks one."""
    key, fields = row.pop("__key__"), row.pop("json")
    values = {name: value for name, value in row.items() if value is not None and name != "__url__"}
    bytes_of = {name: value["bytes"] if isinstance(value, dict) else value for name, value in values.items()}
    encoded = {name: value.encode() if isinstance(value, str) else value for name, value in bytes_of.items()}
    return key, {**digests(encoded), "json": {name: value for name, value in fields.items() if value is not None}}


def energon(folder: Path) -> Found:
    """``energon prepare`` of each split, and its own loader."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_val_dataset,
        stateless,
    )

    @edataclass
    class Whole(Sample):
        members: dict[str, Any]

    @stateless
    def cook(sample: dict[str, Any]) -> Whole:
        return Whole(**basic_sample_keys(sample), members=digests(sample))

    class Crude(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

    found: Found = {}
    for split in tars(folder):
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder / split)]
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        subprocess.run([*command, *options], check=True, stdout=sys.stderr, timeout=60)
        one = WorkerConfig(rank=0, world_size=1, num_workers=0)
        data = get_val_dataset(
            folder / split, split_part="train", worker_config=one, batch_size=None, task_encoder=Crude()
        )
        found[split] = [(str(sample.__key__).rpartition("/")[2], sample.members) for sample in get_loader(data)]
    return found


READERS: dict[str, Callable[[Path], Found]] = {
    reader.__name__: reader for reader in (webdataset, wids, datasets, energon)
}

if __name__ == "__main__":
    print(json.dumps(READERS[sys.argv[1]](Path(sys.argv[2]))))
