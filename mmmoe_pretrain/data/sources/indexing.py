"""Makes the index of a source, where that is missing, damaged or incomplete, from the headers of its shards.

One process of a machine does it while the others wait. The file lies beside the shards if their folder is local and
can be written, else in ``$MMMOE_CACHE`` (``~/.cache/mmmoe``). Shards that it knows are not read again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import xxhash

from mmmoe_pretrain.data.sources.index import DamagedIndex, Index, Rows, Writer, draft_of, drafts_of
from mmmoe_pretrain.data.sources.listing import Listing, is_remote, remote_folder
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.storage.files import Files, Stat, StorageError
from mmmoe_pretrain.progress import Progress
from mmmoe_pretrain.urls import filled_in, join, local_path, redacted

log = logging.getLogger(__name__)
NAME = "shards.index"  # in a folder of shards
REQUESTS = 16  # remote shards whose headers are read at the same time
CHECKED_AT_ONCE = 2_000_000, 4000  # samples, shards; the rows of a larger index are checked when they are first read
STALL_SECONDS = 1800.0  # without a shard indexed by the process that others wait for
_POLL_SECONDS = 0.2
_LOCAL_VERSION = re.compile(r"\d+\+\d+")  # of ``local.py``

Ask = Literal["all", "local", "none"]
Walk = Callable[[Callable[[str], tuple[Stat, Rows]], Iterable[str]], Iterable[tuple[Stat, Rows]]]


def open_index(listing: Listing, files: Files, walk: Walk | None = None, *, ask: Ask = "local") -> Index:
    """The index of the shards of ``listing``; ``walk(function, urls)`` maps over shards in order, e.g. by processes.
    ``ask``: which shards are asked whether they were replaced; of others the first read finds it.

    Raises ValueError where a shard is damaged, or has another size than its index or list says.
    """
    home = home_of(listing)
    labels = [label(shard.url, home) for shard in listing.shards]
    if ask == "none" and sum(path.exists() for path in places(listing, home)) > 1:
        ask = "local"  # the one beside shards that cannot be written may be of other files: they tell
    stats = _stats(listing, files, ask)
    for shard, stat in zip(listing.shards, stats, strict=True):
        if stat is not None and shard.size not in (None, stat.size):
            raise ValueError(other_size(shard.url, stat.size, shard.listed_in, shard.size, shard.listed_in))
    for path in places(listing, home):
        found = _opened(path)
        if found is not None and _reusable(found, listing, labels, stats) == list(range(len(found.names))):
            return found
    return _built(listing, labels, stats, files, walk)


def _stats(listing: Listing, files: Files, ask: Ask) -> list[Stat | None]:
    urls = [shard.url for shard in listing.shards]
    asked = [url for url in urls if ask == "all" or (ask == "local" and not is_remote(url))]
    parts = [asked[n::REQUESTS] for n in range(min(REQUESTS, len(asked)))]
    with ThreadPoolExecutor(REQUESTS) as pool:  # a network disk takes a millisecond for each, and many at a time
        answers = pool.map(lambda part: [(url, files.stat(url)) for url in part], parts)
        found = dict(itertools.chain.from_iterable(answers))
    return [found.get(url) for url in urls]


def home_of(listing: Listing) -> str:
    """The folder or URL of one that ``listing`` names, or the local folder of all of its shards; empty where there is
    none."""
    if folder := remote_folder(listing.spec):
        return _plain(folder)
    whole = os.path.normpath(local_path(listing.spec))
    if os.path.isdir(whole):
        return whole
    folders = {"" if is_remote(shard.url) else os.path.dirname(_path(shard.url)) for shard in listing.shards}
    return folders.pop() if len(folders) == 1 else ""


def places(listing: Listing, home: str) -> list[Path]:
    """Where the index of ``listing`` may lie, the preferred place first."""
    named = "::".join(label(part, "") for part in filled_in(listing.spec).split("::"))
    key = xxhash.xxh3_64_hexdigest(named.encode())
    slug = re.sub(r"[^A-Za-z0-9]+", "-", named)[-60:].strip("-")
    in_cache = cache_folder() / "index" / f"{slug}-{key}.index"
    if not home or is_remote(home):
        return [in_cache]
    if os.path.isdir(local_path(listing.spec)):
        beside = Path(home) / NAME
    elif len(listing.shards) == 1:
        beside = Path(f"{_path(listing.shards[0].url)}.index")
    else:
        beside = Path(home) / f"shards-{key}.index"
    return [beside, in_cache]


def cache_folder() -> Path:
    """``$MMMOE_CACHE``, or ``~/.cache/mmmoe``; without a home, a folder of the user for temporary files."""
    if named := os.environ.get("MMMOE_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "mmmoe"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"mmmoe-{os.getuid()}"


def label(url: str, home: str) -> str:
    """The name of a shard in an index: below its ``home``, or a path or URL without credentials."""
    if not is_remote(url):
        path = local_path(url)
        if home and path.startswith(f"{home}/") and os.path.normpath(path) == path:
            return path[len(home) + 1 :]
        return os.path.relpath(_path(url), home) if home else _path(url)
    plain = _plain(url)
    return plain[len(home) + 1 :] if home and plain.startswith(f"{home}/") else plain


def _plain(url: str) -> str:
    scheme, _, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _path(url: str) -> str:
    return os.path.abspath(local_path(url))


def _opened(path: Path) -> Index | None:
    """The index at ``path``; None where there is none that is sound."""
    try:
        found = Index(path)
        if len(found) <= CHECKED_AT_ONCE[0] and len(found.names) <= CHECKED_AT_ONCE[1]:
            found.check()
        return found
    except FileNotFoundError:
        return None
    except (DamagedIndex, OSError) as error:
        log.warning("%s: it is made again", str(error).partition("; remove it")[0])
        return None


def _reusable(index: Index, listing: Listing, labels: list[str], stats: list[Stat | None]) -> list[int | None]:
    """For each shard of ``listing`` its number in ``index``, or None where it must be read. Raises ValueError where
    its size is another one."""
    number_of = {name: number for number, name in enumerate(index.names)}
    found: list[int | None] = []
    for shard, name, stat in zip(listing.shards, labels, stats, strict=True):
        number = number_of.get(name)
        if number is not None:
            size, version = int(index.bytes[number]), index.versions[number]
            for actual in (stat.size if stat else None, shard.size):
                if actual not in (None, size):
                    raise ValueError(other_size(shard.url, actual, "its index", size, index.path))
            if stat is not None and stat.version != version and is_comparable(version, shard.url):
                number = None
        found.append(number)
    return found


def other_size(url: str, actual: int | None, where: str, size: int | None, file: Path | str | None = None) -> str:
    """That a shard is not the one that was listed or indexed. ``file``: the list or index."""
    remedy = f", or remove {file} if that was meant" if file else ""
    return (
        f"shard {redacted(url)} has {actual} bytes, but {where} says {size}: it is truncated or was replaced; copy "
        f"or make it again{remedy}"
    )


def _built(listing: Listing, labels: list[str], stats: list[Stat | None], files: Files, walk: Walk | None) -> Index:
    candidates = places(listing, home_of(listing))
    path = next((path for path in candidates if _can_write(path.parent)), candidates[-1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path, f"indexes {redacted(listing.spec)}") as beat:
            old, reused = _best(candidates, listing, labels, stats)
            if old is None and _fetched(remote_folder(listing.spec), files, path):
                old, reused = _best(candidates, listing, labels, stats)
            if old is not None and reused == list(range(len(old.names))):
                return old  # another process made it meanwhile
            todo = [shard.url for shard, number in zip(listing.shards, reused, strict=True) if number is None]
            if todo and is_remote(todo[0]):
                files.stat(
                    todo[0]
                )  # a wrong host or port ends here, and the servers of further shards are waited for
            chosen = walk or (_by_threads if any(map(is_remote, todo)) else map)
            walked = iter(chosen(functools.partial(read_rows, settings=files.settings), todo))
            with (
                Progress(f"indexing {redacted(listing.spec)}", len(todo), "shards") as progress,
                Writer(path, () if old is None else old.kinds) as writer,
            ):
                for name, number in zip(labels, reused, strict=True):
                    if number is None or old is None:
                        stat, rows = next(walked)
                        writer.add(name, stat.version, stat.size, rows)
                        progress.advance()
                        beat()
                    else:
                        writer.copy(old, number, name)
        return Index(path)
    except OSError as error:
        if isinstance(error, ValueError):  # of reading
            raise
        why = error.strerror or error
        raise ValueError(f"the index {path} cannot be written: {why}; free some space, or set MMMOE_CACHE") from None


def _best(
    candidates: list[Path], listing: Listing, labels: list[str], stats: list[Stat | None]
) -> tuple[Index | None, list[int | None]]:
    """Of the indices that are there the one that knows most of the shards, and what is reused of it."""
    best: tuple[Index | None, list[int | None]] = None, [None] * len(labels)
    for index in filter(None, map(_opened, candidates)):
        reused = _reusable(index, listing, labels, stats)
        if reused.count(None) < best[1].count(None):
            best = index, reused
    return best


def _fetched(folder: str, files: Files, path: Path) -> bool:
    """Copy the index that lies beside remote shards, where one does."""
    if not folder:
        return False
    draft = draft_of(path)
    try:
        with files.stream(join(folder, NAME)) as stream, draft.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
        os.replace(draft, path)
        return True
    except StorageError:  # there is none, or a bucket that cannot be listed does not say so
        return False
    finally:
        draft.unlink(missing_ok=True)


def is_comparable(version: str, url: str) -> bool:
    """Whether the version of a shard in an index is one of its server's, and not that of a file that was uploaded."""
    return bool(version) and not (is_remote(url) and _LOCAL_VERSION.fullmatch(version))


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _by_threads(function: Callable[[str], tuple[Stat, Rows]], urls: Iterable[str]) -> Iterator[tuple[Stat, Rows]]:
    """``map`` for what waits for a server."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        waiting: deque[Future[tuple[Stat, Rows]]] = deque()
        try:
            for url in urls:
                waiting.append(pool.submit(function, url))
                if len(waiting) > 2 * REQUESTS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def alone(path: Path, what: str) -> Generator[Callable[[], None], None, None]:
    """Write the file ``path`` alone: wait while another process holds its lock, and remove the drafts of those that
    were killed. Gives a function to be called while the work goes on. Raises ValueError where the other process makes
    no progress."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor, locked = _locked(lock, what)
    try:
        for draft in drafts_of(path) if locked else ():
            draft.unlink(missing_ok=True)
        yield lambda: os.utime(descriptor)
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, what: str) -> tuple[int, bool]:
    """The open file ``path``, and whether it is locked: some file systems have no locks, and each process writes a
    file of its own there."""
    began, last, told = time.monotonic(), 0, False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # its holder removes it
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
            os.close(descriptor)
            continue
        except BlockingIOError:
            changed = os.fstat(descriptor).st_mtime_ns
            os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return descriptor, False
            raise
        if changed != last:
            began, last = time.monotonic(), changed
        if time.monotonic() - began > STALL_SECONDS:
            raise ValueError(
                f"another process {what} and has finished no shard for {STALL_SECONDS / 60:.0f} minutes; end it (it "
                f"holds {path}), and start again"
            )
        if not told:
            log.warning("waiting for another process, which %s", what)
            told = True
        time.sleep(_POLL_SECONDS)
