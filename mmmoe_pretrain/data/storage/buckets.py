"""Files of buckets and of every other URL that fsspec knows; S3 by obstore where that is possible.

obstore's threads do not survive a fork (a child of a process that has used it waits forever), while fsspec starts new
ones. So obstore is used in data workers alone, which never fork, and the rank uses fsspec.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from mmmoe_pretrain.data.storage.retry import Later, TransientError
from mmmoe_pretrain.data.storage.stores import UNKNOWN, Stat, check_same, in_data_worker
from mmmoe_pretrain.urls import MissingError, StorageError, UnavailableError, protocol, redacted

CHUNK = 8 << 20
VERSIONS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "generation", "version_id")
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
DENIED = ("PermissionDeniedError", "UnauthenticatedError")  # of obstore
LASTING = (ImportError, TypeError, ValueError, NotImplementedError, AttributeError)  # a retry changes nothing

T = TypeVar("T")


class FsspecFiles:
    """A store (``stores.Store``) of one protocol of fsspec."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, dict(options)
        self._files: Any = None
        self._answered = False

    def stat(self, url: str, seconds: float) -> Stat:
        info = self._call(url, lambda files, path: files.info(path), seconds)
        if info.get("type") == "directory":
            raise StorageError(f"cannot read {redacted(url)}: it is a folder, not a file; correct the URL")
        version = next((str(info[key]) for key in (*VERSIONS, *TIMES) if info.get(key)), "")
        if info.get("size") is None:
            return Stat(UNKNOWN, version, ranges=False)
        return Stat(int(info["size"]), version)

    def get(self, url: str, start: int, size: int, expected: Stat, seconds: float) -> bytes:
        data = self._call(url, lambda files, path: files.cat_file(path, start=start, end=start + size), seconds)
        check_same(url, expected, self.stat(url, seconds))  # after it: the same now means the same while it was read
        if len(data) != size:
            raise TransientError(f"a short body: {len(data)} bytes of {size}")
        return data

    def list(self, url: str, seconds: float) -> list[str]:
        def names(files: Any, path: str) -> list[str]:
            files.invalidate_cache()  # what other machines wrote
            inside = (entry for entry in files.ls(path, detail=True) if entry["name"].rstrip("/") != path.rstrip("/"))
            return sorted(
                entry["name"].rstrip("/").rpartition("/")[2] + "/" * (entry["type"] == "directory")
                for entry in inside
            )

        return self._call(url, names, seconds)

    def chunks(self, url: str, offset: int, seconds: float) -> Iterator[bytes]:
        file = self._call(url, lambda files, path: files.open(path, "rb"), seconds)
        while data := self._timed(url, lambda: file.read(CHUNK), seconds):
            if len(data) > offset:
                yield data[offset:]
            offset = max(0, offset - len(data))

    def close(self) -> None:
        self._files = None

    def _call(self, url: str, call: Callable[[Any, str], Any], seconds: float) -> Any:
        def work() -> Any:
            if self._files is None:
                import fsspec

                own = {"skip_instance_cache": True, "use_listings_cache": False}
                self._files = fsspec.filesystem(self._name, **{**own, **self._options})
            return call(self._files, self._files._strip_protocol(url))

        return self._timed(url, work, seconds)

    def _timed(self, url: str, work: Callable[[], T], seconds: float) -> T:
        may_be_wrong = not self._answered and not in_data_worker()  # see http.py
        with _explained(url, may_be_wrong):
            import fsspec  # here: local runs need not import it

            if self._files is None:  # not in the thread: a fork during an import in a thread would leave it locked
                fsspec.get_filesystem_class(self._name)
            result = Later(work).result(seconds)
            self._answered = True
            return result


class ObstoreFiles:
    """A store (``stores.Store``) of S3 by obstore."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = s3_settings(options)
        self._buckets: dict[str, Any] = {}

    def stat(self, url: str, seconds: float) -> Stat:
        import obstore

        meta = self._call(url, seconds, obstore.head)
        return Stat(meta["size"], meta["e_tag"] or "")

    def get(self, url: str, start: int, size: int, expected: Stat, seconds: float) -> bytes:
        import obstore

        def work(bucket: Any, key: str) -> tuple[Any, bytes]:
            result = obstore.get(bucket, key, options={"range": (start, start + size)})
            return result.meta, bytes(result.bytes())

        meta, data = self._call(url, seconds, work)
        check_same(url, expected, Stat(meta["size"], meta["e_tag"] or ""))
        if len(data) != size:
            raise TransientError(f"a short body: {len(data)} bytes of {size}")
        return data

    def list(self, url: str, seconds: float) -> list[str]:
        import obstore

        def work(bucket: Any, key: str) -> list[str]:
            found = obstore.list_with_delimiter(bucket, key.rstrip("/") or None)
            files = [entry["path"].rpartition("/")[2] for entry in found["objects"]]
            folders = [folder.rstrip("/").rpartition("/")[2] + "/" for folder in found["common_prefixes"]]
            if not files and not folders:
                raise FileNotFoundError
            return sorted(files + folders)

        return self._call(url, seconds, work)

    def close(self) -> None:
        self._buckets.clear()

    def _call(self, url: str, seconds: float, work: Callable[[Any, str], T]) -> T:
        from obstore.store import S3Store

        bucket, _, key = url.partition("://")[2].partition("/")
        if bucket not in self._buckets:
            plain = str(self._options.get("endpoint", os.environ.get("AWS_ENDPOINT_URL", ""))).startswith("http://")
            self._buckets[bucket] = S3Store(
                bucket,
                **self._options,
                client_options={"allow_http": plain, "timeout": f"{2 * seconds:.0f}s"},  # longer than we wait
                retry_config={"max_retries": 0},
            )
        with _explained(url):
            return Later(lambda: work(self._buckets[bucket], key)).result(seconds)


@contextmanager
def _explained(url: str, may_be_wrong: bool = False) -> Iterator[None]:
    """Errors of a client library as a StorageError with the remedy, or a TransientError. ``may_be_wrong``: the server
    has never answered."""
    try:
        yield
    except (StorageError, TransientError):
        raise
    except Exception as error:  # noqa: BLE001 - each client library has its own errors
        name, where = type(error).__name__, f"cannot read {redacted(url)}"
        cause = redacted(f"{name}: {' '.join(str(error).split())[:300]}")
        if isinstance(error, FileNotFoundError):
            raise MissingError(f"{where}: it does not exist; correct the URL") from None
        if isinstance(error, (IsADirectoryError, NotADirectoryError)):
            raise StorageError(f"{where}: it is a folder, not a file; correct the URL") from None
        if isinstance(error, PermissionError) or name in DENIED or "credential" in cause.lower():
            raise StorageError(
                f"{where}: no permission ({cause}); set the credentials of {protocol(url)}:// in the environment, or "
                f"a profile in data.storage_options"
            ) from None
        if isinstance(error, LASTING):
            raise StorageError(
                f"{where}: {cause}; install the package of {protocol(url)}:// on every node, or correct the URL and "
                f"data.storage_options"
            ) from None
        if name == "EndpointConnectionError" and may_be_wrong:  # after several attempts of s3fs
            raise UnavailableError(
                f"{where}: {cause}; check the host and port of endpoint_url, and that the server runs"
            ) from None
        raise TransientError(cause) from None


def s3_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """obstore's names of s3fs's options."""
    given = {**options, **options.get("client_kwargs", {})}
    names = {"endpoint_url": "endpoint", "region_name": "region", "anon": "skip_signature"}
    return {names[name]: value for name, value in given.items() if name in names}


def obstore_reads(name: str, options: Mapping[str, Any]) -> bool:
    """obstore is installed, all that it needs is at hand, and no fork can come after its use here."""
    client = options.get("client_kwargs", {})
    known = {*options} <= {"endpoint_url", "anon", "client_kwargs"} and {*client} <= {"endpoint_url", "region_name"}
    anonymous = bool(options.get("anon"))
    signed = "AWS_ACCESS_KEY_ID" in os.environ and "AWS_PROFILE" not in os.environ
    placed = "region_name" in client or bool({"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys())
    return (
        name in ("s3", "s3a")
        and in_data_worker()
        and known
        and (anonymous or signed)
        and placed
        and importlib.util.find_spec("obstore") is not None
    )
