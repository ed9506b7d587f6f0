"""Folders as Hugging Face's datasets has them, as tables: imagefolder and audiofolder with a ``metadata`` file, data
files by split (``data/train-00000-of-00005.parquet``, or the ``configs`` of README.md), and ``save_to_disk``.

No script of a dataset is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmmoe_pretrain.data.sources.listing import is_relative_name
from mmmoe_pretrain.data_prep.rows.row import SPLITS, split_called
from mmmoe_pretrain.data_prep.rows.tables import Source
from mmmoe_pretrain.data_prep.rows.walk import walk
from mmmoe_pretrain.untrusted import MAX_YAML_BYTES, brief, parse_yaml, read_json

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CARD = "README.md"
SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
TABLES = ("parquet", "arrow", "csv", "tsv", "jsonl", "json")
_PART = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")  # train-00000-of-00005


def dataset_sources(root: Path, config: str = "") -> list[Source]:
    """The tables of a dataset folder; ``config``: of those in its README.md. Raises ValueError."""
    if (root / SAVED_SPLITS).is_file() or (root / SAVED).is_file():
        return list(_saved(root))
    if found := _configured(root, config):
        return found
    if found := [Source(str(path), _below(path.parent, root), _split(path, root)) for path in metadata_files(root)]:
        return found
    return [_source(path, root) for path in data_files(root)]


def metadata_files(root: Path) -> list[Path]:
    """The ``metadata`` files of a folder and of its folders of splits."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    return [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]


def data_files(root: Path) -> list[Path]:
    """All Parquet files."""
    ignored: Counter[str] = Counter()
    found = (
        [*files] if folder == "" else [f"{folder}/{name}" for name in files] for folder, files in walk(root, ignored)
    )
    return [root / name for names in found for name in names if name.lower().endswith(".parquet")]


def _saved(root: Path) -> Iterator[Source]:
    """The Arrow streams of ``save_to_disk``, in their order."""
    folders = [(root, "")]
    if (root / SAVED_SPLITS).is_file():
        names = read_json(root / SAVED_SPLITS).get("splits")
        if not isinstance(names, list) or not all(map(is_relative_name, names)):
            raise ValueError(f"{root / SAVED_SPLITS} names no splits; save the dataset again")
        folders = [(root / name, name) for name in names]
    for folder, split in folders:
        state = read_json(folder / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ValueError(f"{folder} has an order of its own; save it again after dataset.flatten_indices()")
        files = state.get("_data_files")
        names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        if not names or not all(map(is_relative_name, names)):
            raise ValueError(f"{folder / 'state.json'} names no data files; save the dataset again")
        called = split_called(split)
        is_split = called in SPLITS
        for name in names:
            yield Source(str(folder / name), "", called if is_split else "", "" if is_split else split)


def _configured(root: Path, config: str) -> list[Source]:
    """The data files that ``configs`` in README.md names; none where it has none."""
    configs = _configs(root)
    names = [str(each.get("config_name", "default")) for each in configs]
    if config and config not in names:
        raise ValueError(f"{root / CARD} has no config {config}, but {', '.join(names) or 'none'}")
    wanted = config or ("default" if "default" in names else names[0] if len(names) == 1 else "")
    if configs and not wanted:
        raise ValueError(f"{root / CARD} has the configs {', '.join(names)}; name one, e.g. {root}#{names[0]}")
    found: list[Source] = []
    for each in configs:
        if str(each.get("config_name", "default")) == wanted:
            for split, pattern in _patterns(each.get("data_files")):
                found += _matching(root, split, pattern)
    return found


def _configs(root: Path) -> list[dict[str, Any]]:
    path = root / CARD
    if not path.is_file():
        return []
    with path.open("rb") as file:
        head = file.read(MAX_YAML_BYTES).decode("utf-8", "replace")
    match = re.match(r"---\r?\n(.*?)\n---(?:\s|$)", head, re.DOTALL)
    card = parse_yaml(match[1], str(path)) if match else None
    configs = card.get("configs") if isinstance(card, dict) else None
    found = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    return [each for each in found if each.get("data_files")]


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Split and pattern of each entry of ``data_files``: a string, a list, or entries with split and path."""
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry.get("split", ""), entry.get("path")) if isinstance(entry, dict) else ("", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            yield str(split), str(path)


def _matching(root: Path, split: str, pattern: str) -> list[Source]:
    if not is_relative_name(pattern):
        raise ValueError(f"{root / CARD} names {brief(pattern)}, which is no file in its folder; correct it")
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    others = [path for path in paths if path.suffix[1:].lower() not in TABLES]
    if others or not paths:
        what = f"{others[0].name}, which is no table ({', '.join(TABLES)})" if others else "no file"
        raise ValueError(
            f"{root / CARD}: {brief(pattern)} names {what}; pass --form folder, zip or shards, or name it"
        )
    if not split:
        return [_source(path, root) for path in paths]
    called = split_called(split)
    known = called in SPLITS
    return [
        Source(str(path), _below(path.parent, root), called if known else "", "" if known else split)
        for path in paths
    ]


def _source(path: Path, root: Path) -> Source:
    """A data file; its split by its name or folder, and as its subset what is none of our splits."""
    name = _PART.sub("", path.stem)
    for candidate in (name, *reversed(path.relative_to(root).parts[:-1])):
        called = split_called(candidate)
        if called in SPLITS:
            return Source(str(path), _below(path.parent, root), called)
    words = [split_called(word) for word in re.split(r"[-_.]+", name)]
    split = next((word for word in words if word in SPLITS), "")
    return Source(str(path), _below(path.parent, root), split, name if name != path.stem else "")


def _split(path: Path, root: Path) -> str:
    called = split_called(PurePosixPath(_below(path.parent, root)).name)
    return called if called in SPLITS else ""


def _below(folder: Path, root: Path) -> str:
    below = str(folder.relative_to(root))
    return "" if below == "." else below
