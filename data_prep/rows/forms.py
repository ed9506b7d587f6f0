"""Which form of data a path or URL has, by names and first lines: what ``inputs.py`` opens."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

from mmmoe_pretrain.data.sources.listing import ENERGON, LIST, is_compressed, is_remote, refuse_compressed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.huggingface import SAVED, SAVED_SPLITS, metadata_files
from mmmoe_pretrain.data_prep.rows.manifest import lines
from mmmoe_pretrain.data_prep.rows.shards import holds_shards
from mmmoe_pretrain.data_prep.rows.tables import TEXT_TABLES, ending, is_ljspeech, is_table
from mmmoe_pretrain.data_prep.rows.walk import walk
from mmmoe_pretrain.limits import MAX_META_BYTES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.untrusted import MAX_JSON_BYTES, parse_json
from mmmoe_pretrain.urls import local_path, redacted

MANIFEST = "manifest.jsonl"
SKIPPED = "skipped.jsonl"  # of shards of ours
FOLDERS_LOOKED_AT = 50
REMEDY = "name a folder, a table (.csv, .tsv, .jsonl, .parquet), a .zip, a .tar or a manifest.jsonl"


def detect(place: str, files: Files) -> str:
    """The form of a path or URL. Raises ValueError where it has none, or several fit."""
    if is_remote(place):
        return _by_suffix(place, files) or "shards"
    path = Path(local_path(place))
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        before = place.rpartition("#")[0]
        if before and Path(before).is_dir():  # a split or config
            return "shards" if (Path(before) / ENERGON).is_dir() else "huggingface"
        raise ValueError(f"there is nothing at {place}; correct the path: {REMEDY}")
    if is_compressed(path.name):
        refuse_compressed(str(path.parent), path.name)
    form = _by_suffix(place, files)
    if form:
        return form
    suffix = path.suffix[1:].lower()
    if suffix == "arrow":
        raise ValueError(f"{place} is a part of a dataset; name the folder that save_to_disk made")
    if format_of(suffix):
        raise ValueError(f"{place} is one {format_of(suffix)} file; name its folder, or a table that lists it")
    raise ValueError(f"{place} is of no form that is read; {REMEDY}, or say which it is by --form")


def _by_suffix(place: str, files: Files) -> str:
    suffix = ending(place)
    if suffix in ("tar", "zip"):
        return {"tar": "shards"}.get(suffix, suffix)
    if suffix == "json":
        held = parse_json(files.read_all(place, MAX_JSON_BYTES), redacted(place))
        return "shards" if isinstance(held, dict) and "shardlist" in held else "table"
    if suffix == "jsonl" and not is_remote(place) and _is_manifest(Path(local_path(place)), files):
        return "manifest"
    packed = ending(place.removesuffix(".gz")) if suffix == "gz" else ""
    return "table" if suffix in (*TEXT_TABLES, "parquet") or packed in TEXT_TABLES else ""


def _is_manifest(path: Path, files: Files) -> bool:
    """Whether JSON lines have keys."""
    if path.name == MANIFEST:
        return True
    files.stat(str(path))  # a pipe is refused here
    with path.open("rb") as file:
        first = next(lines(file), (0, b"{}"))[1]
    try:
        values = parse_json(first, str(path), MAX_META_BYTES)
    except ValueError:
        return False
    return isinstance(values, dict) and bool({"key", "__key__"} & values.keys())


def _of_folder(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return "manifest"
    names = sorted(os.listdir(folder))
    suffixes = Counter(ending(name) for name in names)
    if (folder / SAVED_SPLITS).is_file() or ((folder / SAVED).is_file() and suffixes["arrow"]):
        return "huggingface"
    first = [files for _, files in itertools.islice(walk(folder, Counter()), FOLDERS_LOOKED_AT)]
    tables = [name for name in names if is_table(name) and name != SKIPPED]
    found: dict[str, str] = {}  # form -> what speaks for it
    inner = (path for path in map(folder.joinpath, names) if path.is_dir())
    if holds_shards(folder) or any(map(holds_shards, itertools.islice(inner, FOLDERS_LOOKED_AT))):
        if LIST in names:
            return "shards"
        found["shards"] = "shards (*.tar)"
        stems = {name.rpartition(".")[0] for name in names if name.endswith(".tar")}
        tables = [name for name in tables if name.rpartition(".")[0] not in stems]  # of img2dataset, and ours
    elif any(map(_has_file_names, metadata_files(folder))):
        return "huggingface"
    elif any(ending(name) == "parquet" for files in first for name in files):
        found["huggingface"] = "Parquet files"
        tables = [name for name in tables if ending(name) != "parquet"]
    if suffixes["zip"]:
        found["zip"] = "zip archives"
    if tables and any(is_ljspeech(str(folder / name)) for name in tables):
        return "table"
    if tables:
        found["table"] = ", ".join(tables[:3]) + (", ..." if len(tables) > 3 else "")
    if any(format_of(ending(name)) in ("image", "audio") for files in first for name in files):
        found["folder"] = "images or audio"
    if len(found) > 1:
        table = f" name the table ({folder}/{tables[0]})," if "table" in found else ""
        raise ValueError(
            f"{folder} holds {' and '.join(found.values())}, so it is unclear what its samples are;{table} name an "
            f"inner folder, or choose by --form {' or '.join(found)}"
        )
    return next(iter(found), "folder")


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(MAX_META_BYTES).decode("utf-8", "replace")


def _has_file_names(metadata: Path) -> bool:
    """Whether a ``metadata`` file is one of Hugging Face's imagefolder."""
    return metadata.suffix == ".parquet" or "file_name" in _first_line(metadata)
