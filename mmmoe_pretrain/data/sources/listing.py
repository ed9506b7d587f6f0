"""What a path in a config names, as an ordered list of shards.

A folder, a tar, a URL of either, braces (``data-{000..099}.tar``), ``a::b`` for several of these, a list of shards
(``shards.json`` of wids, which lies in the folder or is named itself), and folders that Energon prepared
(``.nv-meta``; only its JSON and YAML are read). Lists name files below their folder, or URLs of object stores and web
servers; a command (``pipe:``) is run only where the config itself names it.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand

from mmmoe_pretrain.data.sources.members import names
from mmmoe_pretrain.data.sources.pipes import PIPE
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data.storage.http import MAX_SKIPPED
from mmmoe_pretrain.paths import VARIABLE
from mmmoe_pretrain.untrusted import brief, parse_json, parse_yaml
from mmmoe_pretrain.urls import filled_in, join, local_path, protocol, redacted, server_of

LIST = "shards.json"
ENERGON = ".nv-meta"
TRAIN = "train"
MAX_LIST_BYTES = 64 << 20
MAX_COMMANDS = 16  # that a message proposes
MAX_SHARDS = 1_000_000  # that braces may expand to
_LIKE_A_SHARD = re.compile(r"\.(tar|tgz)(\.(gz|bz2|xz|zst|lz4))?$", re.IGNORECASE)
_UNPACKED_BY = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd", "lz4": "unlz4"}
_PRINTED_BY = {"file": "cat {}", "http": "curl -sSf {}", "https": "curl -sSf {}", "s3": "aws s3 cp {} -"}
_LISTED_URL = re.compile(r"^(https?|s3a?|gs|gcs|az|abfss?|adl|hf|oss|memory)://[^:]+(:\d+/)?[^:]*$", re.IGNORECASE)
_BRACES = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")


class NoShards(ValueError):
    """There is nothing at a path."""


@dataclass(frozen=True)
class Shard:
    """``size`` and ``samples``: as a list says, None where none does."""

    url: str
    size: int | None = None
    samples: int | None = None
    listed_in: str = ""


@dataclass(frozen=True)
class Listing:
    """The shards of ``spec`` in order. ``left_out``: how many files beside them look like shards, by ending."""

    spec: str
    shards: tuple[Shard, ...]
    left_out: Counter[str]


def is_remote(url: str) -> bool:
    """Whether ``url`` is none of a local file."""
    return protocol(url) != "file"


def without_ranges(urls: Iterable[str], files: Files) -> list[str]:
    """A warning for each web server of shards that sends whole files instead of the ranges that are asked for. Each
    is asked about one of its shards; none where the cache can hold them."""
    asked = {server_of(url): url for url in urls if protocol(url) in ("http", "https")}
    stats = {server: files.stat(url) for server, url in asked.items()}
    most = 0 if files.settings.cache is None else MAX_SKIPPED
    return [
        f"{redacted(server)} does not answer range requests: each sample that is read transfers its shard up to the "
        f"sample ({redacted(asked[server])} has {max(0, stat.size) / 1e6:,.1f} MB), and nothing beyond 64 MiB can be "
        f"read. Use a server that answers them (nginx, a bucket), set data.cache for shards up to 64 MiB, or train "
        f'on the shards in their order: path: "pipe:curl -sSf URL"'
        for server, stat in stats.items()
        if not stat.ranges and not (stat.version and 0 <= stat.size <= most)
    ]


def is_stream(spec: str) -> bool:
    """Whether ``spec`` can only be read on, as the output of a command is."""
    return spec.startswith(PIPE) or "::pipe:" in spec


def remote_folder(spec: str) -> str:
    """The URL of the folder that ``spec`` is; empty for anything else."""
    url = filled_in(spec) if not is_stream(spec) else ""
    is_other = "::" in url or "#" in url or _BRACES.search(url) or _ending(url) in ("tar", "json")
    return url.rstrip("/") if is_remote(url) and not is_other else ""


def is_absent(spec: str) -> bool:
    """Whether local files that ``spec`` names are not there; servers are not asked."""
    parts = [] if is_stream(spec) else [local_path(part) for part in spec.split("::") if not is_remote(part)]
    named = [part for part in parts if not _BRACES.search(part) and not VARIABLE.search(part)]
    return not all(Path(part).exists() or ("#" in part and Path(part.rpartition("#")[0]).is_dir()) for part in named)


def list_shards(spec: str, files: Files) -> Listing:
    """The shards that ``spec`` names. Raises ValueError where there are none, NoShards where nothing is there."""
    shards: list[Shard] = []
    left_out: Counter[str] = Counter()
    for part in spec.split("::"):
        for url in expanded(filled_in(part)):  # perhaps a signed URL
            found, others = _shards_of(url, files)
            shards += found
            left_out += others
    twice = [url for url, count in Counter(shard.url for shard in shards).items() if count > 1]
    if twice:
        raise ValueError(
            f"{redacted(spec)} names shard {redacted(twice[0])} more than once; name each once (there is weight)"
        )
    return Listing(spec, tuple(shards), left_out)


def expanded(part: str) -> Iterable[str]:
    """What the braces of ``part`` name."""
    if not _BRACES.search(part) or (not is_remote(part) and Path(part).exists()):
        return [part]
    try:
        urls = [url for url, _ in zip(braceexpand(part), range(MAX_SHARDS + 1), strict=False)]
    except ValueError as error:
        why = f"{redacted(part)}: its braces cannot be expanded ({error})"
        raise ValueError(f"{why}; write data-{{000..099}}.tar") from None
    if len(urls) > MAX_SHARDS:
        raise ValueError(f"{redacted(part)} names more than {MAX_SHARDS:,} shards; correct its braces")
    return urls


def _shards_of(url: str, files: Files) -> tuple[list[Shard], Counter[str]]:
    local = None if is_remote(url) else Path(local_path(url))
    ending = _ending(url)
    if is_compressed(url.partition("?")[0]) and (local is None or local.is_file()):
        refuse_compressed(*url.partition("?")[0].rpartition("/")[::2])
    if ending == "json" and (local is None or local.is_file()):
        return _listed(url, files), Counter()
    if ending == "tar" and (local is None or not local.is_dir()):
        if local is not None and not local.exists():
            raise NoShards(f"there is no shard {local}; make it by mmmoe-data shard, or correct the path")
        return [Shard(url)], Counter()
    if local is not None and not local.is_dir():
        folder, split = str(local).rpartition("#")[::2]
        if folder and (Path(folder) / ENERGON).is_dir():
            return _prepared(folder, split, files), Counter()
        if local.is_file():
            raise ValueError(
                f"{local} is neither a .tar nor a list of shards (.json); correct the path, or unpack it"
            )
        raise NoShards(f"no folder of shards at {local}; make it by mmmoe-data shard, or correct the path")
    folder, _, split = url.partition("#") if local is None else (url, "", "")
    return _of_folder(str(local) if local is not None else folder.rstrip("/"), split, files)


def _of_folder(folder: str, split: str, files: Files) -> tuple[list[Shard], Counter[str]]:
    held = files.list(folder)
    if LIST in held and not split:
        shards = _listed(join(folder, LIST), files)
    elif f"{ENERGON}/" in held:
        shards = _prepared(folder, split or TRAIN, files)
    else:
        shards = [Shard(join(folder, name)) for name in held if name.endswith(".tar")]
    if not shards:
        refuse_compressed(folder, *held)
        raise ValueError(_why_none(folder, held, files))
    return shards, left_out(folder, held, (shard.url for shard in shards))


def left_out(folder: str, held: Iterable[str], urls: Iterable[str]) -> Counter[str]:
    """Of the names ``held`` by ``folder`` those that look like shards and are not among ``urls``, by their ending."""
    others = set(held) - {url.partition("?")[0].removeprefix(f"{folder.partition('?')[0]}/") for url in urls}
    why = f" not named in {redacted(join(folder, LIST))}" if LIST in held else ""
    return Counter(f"*{ending[0]}{why}" for ending in map(_LIKE_A_SHARD.search, others) if ending)


def refuse_compressed(folder: str, *held: str) -> None:
    """Raise ValueError where files that ``folder`` holds are compressed shards."""
    found = sorted(name for name in held if is_compressed(name))
    if not found:
        return
    ending, place = _ending(found[0]), redacted(join(folder, found[0]) if folder else found[0])
    pipes = [_command(folder, name) for name in in_braces(found)]
    pipe = "::".join(pipes[:MAX_COMMANDS]) + ("::..." if len(pipes) > MAX_COMMANDS else "")
    count = f"{len(found):,} compressed shards, such as {place}," if len(found) > 1 else f"compressed shard {place}"
    raise ValueError(
        f"{count} cannot be read sample by sample, since no range of a compressed file can be unpacked by itself; "
        f'unpack by {_UNPACKED_BY[ending]}, or train on them in their order: path: "{pipe}"'
    )


def _command(folder: str, name: str) -> str:
    """The ``pipe:`` that prints the shards ``name``, perhaps with braces, of ``folder`` as what can be read."""
    ending, place = _ending(name), redacted(join(folder, name) if folder else name)
    plain = place.translate(str.maketrans("{}", "__"))
    quoted = place if shlex.quote(plain) == plain else shlex.quote(place)
    command = _PRINTED_BY.get(protocol(place), "COMMAND {}").format(quoted)
    return f"{PIPE}{command} | {_UNPACKED_BY[ending]} -c" if ending in ("zst", "lz4") else f"{PIPE}{command}"


def in_braces(found: Iterable[str]) -> list[str]:
    """The names, those with successive numbers as one: ``0.tar``, ``1.tar`` -> ``{0..1}.tar``."""
    runs: list[tuple[str, str, str, str]] = []  # before the first and last number, those, after them
    for before, number, after in sorted(map(_numbered, found), key=lambda its: (its[0], its[2], len(its[1]), its[1])):
        head, first, last, tail = runs[-1] if runs else ("", "", "", "")
        follows = last and number == str(int(last) + 1).zfill(len(last)) and (before, after) == (head, tail)
        if follows and (len(first) == len(number) or first[0] != "0"):
            runs[-1] = head, first, number, tail
        else:
            runs.append((before, number, number, after))
    return [
        f"{head}{{{first}..{last}}}{tail}" if first != last else f"{head}{first}{tail}"
        for head, first, last, tail in runs
    ]


def _numbered(name: str) -> tuple[str, str, str]:
    """The name before, in and after its last number of the stem; the number is empty where there is none."""
    match = re.match(r"(.*?)([0-9]+)([^0-9]*\.(?:tar|tgz)(?:\.\w+)?)$", name, re.IGNORECASE)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def is_compressed(name: str) -> bool:
    """Whether a file looks like a compressed shard."""
    return bool(_LIKE_A_SHARD.search(name)) and _ending(name) in _UNPACKED_BY


def _why_none(folder: str, held: list[str], files: Files) -> str:
    folders = [name[:-1] for name in held if name.endswith("/")]
    splits = folders if is_remote(folder) else [name for name in folders if _holds_shards(Path(folder) / name)]
    if splits:
        first = "train" if "train" in splits else splits[0]
        return (
            f"{redacted(folder)} holds no *.tar, but folders{'' if is_remote(folder) else ' with shards'}: "
            f"{names(splits)}; name one, e.g. {redacted(join(folder, first))}"
        )
    return (
        f"{redacted(folder)} holds no *.tar (but {names(held, most=3) or 'nothing'}); fill it by mmmoe-data shard, "
        f"or correct the path"
    )


def _holds_shards(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / LIST).is_file() or any(_LIKE_A_SHARD.search(path.name) for path in folder.iterdir())
    )


def _ending(url: str) -> str:
    path = url.partition("?")[0].partition("#")[0] if is_remote(url) else url
    return PurePosixPath(path).suffix[1:].lower()


def read_list(url: str, files: Files) -> list[dict[str, Any]]:
    """The entries of a list of shards (``shards.json``)."""
    remedy = "make it again by mmmoe-data shard, or remove it"
    try:
        held = parse_json(files.read_all(url, MAX_LIST_BYTES), redacted(url))
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{redacted(url)} holds {type(held).__name__}, not a JSON object; {remedy}")
    entries = held.get("shardlist")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{redacted(url)} lists no shard; {remedy}")
    return entries


def _listed(url: str, files: Files) -> list[Shard]:
    return [listed_shard(url, entry) for entry in read_list(url, files)]


def listed_shard(url: str, entry: dict[str, Any]) -> Shard:
    """The shard of an ``entry`` of the list ``url``. Raises ValueError where it is neither a URL nor a file that is
    below the list's folder."""
    name, (before, mark, query) = entry.get("url", ""), url.partition("?")
    folder = f"{before.rpartition('/')[0] or '.'}{mark}{query}"
    if isinstance(name, str) and _LISTED_URL.match(name):
        place = name
    elif is_relative_name(name):
        place = join(folder, name) if folder != "." else name
        if not is_remote(place) and not Path(local_path(place)).exists():
            raise ValueError(
                f"{url} names {name}, which does not exist; copy it, or remove the list, and all *.tar are read"
            )
    else:
        raise ValueError(
            f"{redacted(url)} names {brief(redacted(name))}, which is not a file under {redacted(folder)} nor a URL "
            f"of https, s3, gs or the like; correct the list"
        )
    numbers = [entry.get(field) for field in ("filesize", "nsamples")]
    size, samples = (number if type(number) is int else None for number in numbers)
    return Shard(place, size, samples, listed_in=PurePosixPath(url).name)


def is_relative_name(url: object) -> bool:
    """Whether ``url`` is the name of a file that stays below a folder."""
    if not isinstance(url, str) or not url or "://" in url or "\0" in url or not url.isprintable():
        return False
    parts = Path(url).parts
    if url.startswith(("/", "pipe:")) or ".." in parts:
        return False
    return all(len(part.encode()) < 256 for part in parts)


def energon_splits(folder: str, files: Files) -> list[str]:
    """The splits that hold shards, of a folder that Energon prepared."""
    held = _data_of(join(folder, ENERGON), ("split.yaml", "split.json"), files)
    parts = _field(held, "split_parts", dict, redacted(join(folder, ENERGON)))
    return [str(name) for name, shards in parts.items() if shards]


def _prepared(folder: str, split: str, files: Files) -> list[Shard]:
    """The shards of a split of a folder that Energon prepared."""
    place, meta = join(folder, ENERGON), redacted(join(folder, ENERGON))
    counts = _field(_data_of(place, (".info.json", ".info.yaml"), files), "shard_counts", dict, meta)
    held = _data_of(place, ("split.yaml", "split.json"), files)
    parts = _field(held, "split_parts", dict, meta)
    if not isinstance(parts.get(split), list) or not parts[split]:
        full = [name for name, shards in parts.items() if shards]
        raise ValueError(
            f"{meta} has no shards in split {split!r}; its splits are {names(map(str, full)) or 'none'}: name one as "
            f"{redacted(folder)}#NAME"
        )
    excluded = set(map(str, _field({"exclude": held.get("exclude") or []}, "exclude", list, meta)))
    wanted = [name for pattern in parts[split] for name in expanded(str(pattern))]
    if others := excluded - set(counts):
        raise ValueError(
            f"{meta} excludes {brief(min(others))}, which is no shard, and only whole shards are left out here; "
            f"remove the entry, or name the shards by a list (shards.json)"
        )
    if wrong := [name for name in wanted if not is_relative_name(name)]:
        raise ValueError(f"{meta} names {brief(wrong[0])}, which is not a file in its folder; prepare it again")
    chosen = [name for name in wanted if name not in excluded]
    samples = {name: count if type(count) is int else None for name, count in counts.items()}
    return [Shard(join(folder, name), samples=samples.get(name), listed_in=ENERGON) for name in chosen]


def _data_of(meta: str, choices: tuple[str, ...], files: Files) -> dict[str, Any]:
    held = files.list(meta)
    name = next((name for name in choices if name in held), None)
    if name is None:
        raise ValueError(f"{redacted(meta)} has no {' or '.join(choices)}; run energon prepare, or remove the folder")
    data, where = files.read_all(join(meta, name), MAX_LIST_BYTES), redacted(join(meta, name))
    parse: Callable[[], Any] = (
        (lambda: parse_json(data, where)) if name.endswith("json") else (lambda: _yaml(data, where))
    )
    value = parse()
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, not an object; run energon prepare again")
    return value


def _yaml(data: bytes, where: str) -> Any:
    try:
        return parse_yaml(data.decode(), where)
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8; run energon prepare again") from None


def _field(held: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = held.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{where} holds no {name}; run energon prepare again, or remove {where}")
    return value
