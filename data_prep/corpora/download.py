"""One file over HTTP: resumed after an interruption, checked, and renamed only when it is complete.

The bytes go to ``NAME.part``; a later call requests the rest (HTTP Range).
"""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain.progress import Progress

CHUNK = 1 << 18
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5


class MissingFileError(ValueError):
    """The server has no such file."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to fetch and its digest."""

    url: str
    name: str
    algorithm: str  # of hashlib
    digest: str  # hex
    size: int | None = None


def download(remote: Remote, folder: Path, *, backoff_seconds: float = 1.0) -> Path:
    """Fetch ``remote`` into ``folder``; a complete file that is already there is only checked."""
    target = folder / remote.name
    if target.is_file() and file_digest(target, remote.algorithm) == remote.digest:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with Progress(remote.name, remote.size, "MB", scale=10**6) as progress:
        _fetch_with_retries(remote, part, progress, backoff_seconds)
    found = file_digest(part, remote.algorithm)
    if found != remote.digest:
        part.unlink()
        raise ValueError(
            f"{remote.name}: {remote.algorithm} is {found}, expected {remote.digest}; the broken "
            f"download was removed, run the command again"
        )
    part.replace(target)
    return target


def file_digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _fetch_with_retries(remote: Remote, part: Path, progress: Progress, backoff: float) -> None:
    reason: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            _fetch_rest(remote, part, progress)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                kind = MissingFileError if error.code in (404, 410) else ValueError
                raise kind(f"{remote.name}: the server answers {error.code} {error.reason}") from None
            reason = error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = error
    raise ValueError(
        f"{remote.name}: {ATTEMPTS} attempts failed ({reason}); is the network up? The next run resumes "
        f"{part.name}. `mmmoe-data corpus mini` needs no network"
    )


def _fetch_rest(remote: Remote, part: Path, progress: Progress) -> None:
    done = part.stat().st_size if part.exists() else 0
    if remote.size is not None and done == remote.size:
        return
    if remote.size is not None and done > remote.size:
        part.unlink()
        done = 0
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part does not match the server's file: restart
            part.unlink(missing_ok=True)
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        done = done if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else remote.size
        progress.restart(done, total)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress.advance(len(chunk))
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke off at {done} of {total} bytes")
