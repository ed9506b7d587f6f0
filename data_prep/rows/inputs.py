"""The forms in which people have their data, each as rows: a table here, one file a form.

``open_input`` detects the form by names and first lines; where several fit, it names them and asks for ``--form``.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmmoe_pretrain.data.sources.listing import expanded, is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.archives import zip_folders
from mmmoe_pretrain.data_prep.rows.columns import parse_columns
from mmmoe_pretrain.data_prep.rows.folder import folder_rows
from mmmoe_pretrain.data_prep.rows.forms import detect
from mmmoe_pretrain.data_prep.rows.huggingface import METADATA, dataset_sources
from mmmoe_pretrain.data_prep.rows.manifest import manifest_path, manifest_rows
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Fault, Found, split_called
from mmmoe_pretrain.data_prep.rows.shards import shard_rows
from mmmoe_pretrain.data_prep.rows.spool import Order
from mmmoe_pretrain.data_prep.rows.tables import Source, Table, ending, rows_of, table_sources, text_table
from mmmoe_pretrain.data_prep.rows.walk import Folder, walk
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import filled_in, local_path, redacted


@dataclass(slots=True)
class Input:
    """Rows, read once. ``name``: for messages; ``root``: the folder to which their paths are relative; ``order``: in
    which they are written by default; ``notes``: what a user should know, complete once the rows are read."""

    name: str
    root: Path
    rows: Iterator[Found | Fault]
    order: Order = "shuffled"
    equal_keys: str = ""  # what mends all keys that come twice, as the end of a sentence
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a user named: ``places`` are the paths and URLs in ``spec``; ``columns``: field -> column."""

    spec: str
    places: list[str]
    columns: Mapping[str, str]
    files: Files

    @property
    def name(self) -> str:
        return redacted(self.spec)

    @property
    def root(self) -> Path:
        """The folder of a file, a folder itself, or what holds all of several."""
        local = [Path(local_path(place)).absolute() for place in self.places if not is_remote(place)]
        folders = [str(path if path.is_dir() else path.parent) for path in local]
        return Path(os.path.commonpath(folders)) if folders else Path()


def open_input(spec: str | Path, columns: Sequence[str] = (), form: str = "") -> Input:
    """The rows of what ``spec`` names: a path or URL, with braces, or ``a::b`` for several. ``columns``:
    ``FIELD=COLUMN`` of tables; ``form``: of FORMS, where it is not to be detected. Raises ValueError."""
    files = Files()
    places = [url for part in str(spec).split("::") for url in expanded(filled_in(part))]
    if form and form not in FORMS:
        raise ValueError(f"there is no form {form}; the forms are {', '.join(FORMS)}")
    forms = {form} if form else {detect(place, files) for place in places}
    if len(forms) > 1:
        raise ValueError(f"{redacted(spec)} names inputs of several forms ({', '.join(sorted(forms))}); name one")
    asked = _Asked(str(spec), places, parse_columns(columns), files)
    return FORMS[forms.pop()](asked)


def _manifest(asked: _Asked) -> Input:
    if len(asked.places) > 1 or asked.columns:
        what = "is one file a command" if len(asked.places) > 1 else "names its fields itself, without --column"
        raise ValueError(f"{asked.name}: a manifest {what}")
    manifest = manifest_path(Path(local_path(asked.places[0])))
    return Input(str(manifest), manifest.parent, manifest_rows(manifest, split=""))


def _table(asked: _Asked) -> Input:
    sources = list(itertools.chain.from_iterable(table_sources(place, asked.root) for place in asked.places))
    return _of_tables(asked, sources)


def _dataset(asked: _Asked) -> Input:
    if len(asked.places) > 1:
        raise ValueError(f"{asked.name} names several dataset folders; name one a command")
    place = local_path(asked.places[0])
    folder, config = (place, "") if Path(place).is_dir() else place.rpartition("#")[::2]
    if is_remote(place) or not Path(folder).is_dir():
        raise ValueError(
            f"{asked.name} is no local folder; download it: huggingface-cli download --repo-type dataset"
        )
    root = Path(folder).absolute()
    sources = dataset_sources(root, config)
    if not sources:
        raise ValueError(
            f"{asked.name} holds no metadata.csv, .jsonl or .parquet and no data files in Parquet or Arrow"
        )
    given = _of_tables(asked, sources, root)
    if any(Path(source.path).name in METADATA for source in sources):
        given.rows = _counted(given.rows, root, given.notes)
    return given


def _counted(rows: Iterator[Found | Fault], root: Path, notes: list[str]) -> Iterator[Found | Fault]:
    """``rows``, and a note of how many images and clips of audio none of them names."""
    named = 0
    for found in rows:
        if isinstance(found, Found):
            named += sum(ref is not None for ref in (found.row.image, found.row.audio))
        yield found
    held = sum(format_of(ending(name)) in ("image", "audio") for _, files in walk(root, Counter()) for name in files)
    if held > named:
        notes.append(
            f"{root}: {counted(held - named, 'file')} with an image or audio that no row of its metadata names"
        )


def _of_tables(asked: _Asked, sources: list[Source], root: Path | None = None) -> Input:
    root = root or asked.root
    notes: list[str] = []
    open_table = functools.partial(_opened, root=root, files=asked.files)
    has_cells = ending(sources[0].path) in ("parquet", "arrow") and bool(open_table(sources[0]).suffixes)
    rows = rows_of(sources, open_table, asked.columns, notes)
    order = "input" if has_cells else "shuffled"
    return Input(asked.name, root, rows, order, "; --column key= takes the numbers of rows", notes)


def _opened(source: Source, root: Path, files: Files) -> Table:
    if (suffix := ending(source.path)) not in ("parquet", "arrow"):
        return text_table(source, files)
    from mmmoe_pretrain.data_prep.rows import parquet  # pyarrow

    name = source.path if is_remote(source.path) else os.path.relpath(local_path(source.path), root)
    if suffix == "parquet":
        return parquet.parquet_table(source.path, name, files)
    return parquet.arrow_table(source.path, name)


def _folder(asked: _Asked) -> Input:
    if len(asked.places) > 1 or is_remote(asked.places[0]):
        raise ValueError(f"{asked.name} is not one local folder; name one a command, or download it")
    notes: list[str] = []
    folders = functools.partial(walk, asked.root)
    return Input(
        asked.name, asked.root, folder_rows(folders, asked.root, asked.columns, notes, asked.name), notes=notes
    )


def _zip(asked: _Asked) -> Input:
    """One archive, or several, each of which is then a folder of its name."""
    archives: list[str] = []
    for place in asked.places:
        folder = Path(local_path(place))
        inner = sorted(folder.glob("*.zip")) if not is_remote(place) and folder.is_dir() else None
        archives += [place] if inner is None else map(str, inner)
    root = asked.root

    def folders(ignored: Counter[str]) -> Iterator[Folder]:
        for path in archives:
            name = path if is_remote(path) else os.path.relpath(local_path(path), root)
            prefix = Path(name.partition("?")[0]).stem
            is_prefixed = len(archives) > 1 or split_called(prefix) in SPLITS
            yield from zip_folders(path, name, prefix if is_prefixed else "", asked.files, ignored)

    notes: list[str] = []
    return Input(asked.name, root, folder_rows(folders, root, asked.columns, notes, asked.name), notes=notes)


def _shards(asked: _Asked) -> Input:
    notes: list[str] = []
    rows = shard_rows(asked.spec, asked.root, asked.columns, asked.files, notes)
    remedy = "; --column key= puts the name of the shard before each key"
    return Input(asked.name, asked.root, rows, "input", remedy, notes)


FORMS: dict[str, Callable[[_Asked], Input]] = {
    "manifest": _manifest,
    "table": _table,
    "folder": _folder,
    "huggingface": _dataset,
    "zip": _zip,
    "shards": _shards,
}
