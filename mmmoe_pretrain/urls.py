"""URLs of files: how they are written, joined, filled in and printed, and the error of a storage that fails.

Checkpoints and shards may lie behind any URL that fsspec knows. What grants access (a password, a signature, a token)
is filled in from the environment where a file is opened, and never printed or saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.paths import VARIABLE, expand_variables

HIDDEN = "***"
_WORDS = "signature|token|secret|passw|pwd|credential|key|auth"
# A user alone is no secret (abfs://container@account), but with http it may be a token.
_USER = re.compile(r"(?:(?<=://)[^/\s@'\"]*:|(?<=http://)|(?<=https://))[^/\s@'\"]+@", re.IGNORECASE)
_PARAMETER = re.compile(rf"([?&;](?:[^=&;\s]*(?:{_WORDS})[^=&;\s]*|sig|sas|policy)=)[^&;\s'\"<>)\]]+", re.IGNORECASE)
_OPTION = re.compile(rf"(?:{_WORDS})$|secret|token|passw|connection_string|sas|^auth", re.IGNORECASE)
_NO_SECRETS = ("", "anon", "cloud", "google_default", "browser", "cache")  # values of gcsfs's token

# Of commands: ``-H "Authorization: Bearer X"``, ``--user name:X``, ``TOKEN=X``. A variable (``$TOKEN``) is no secret.
_HEADER = re.compile(
    r"((?:authorization|[\w-]*(?:token|key|secret)):\s*(?:(?:bearer|basic|token)\s+)?)(?!\$|bearer|basic|token)[^\s'\"]+",
    re.I,
)
_ARGUMENT = re.compile(
    r"((?:^|\s)(?:-u|--[\w-]*(?:user|pass|password|token|secret|key))(?:\s+|=)['\"]?)(?!\$)[^\s'\"]+", re.I
)
_ASSIGNMENT = re.compile(
    r"((?<![\w/.-])\w*(?:token|secret|password|passwd|key|auth)\w*=['\"]?)(?!\$)[^\s'\"&;]+", re.I
)
MAX_COMMAND = 300  # letters of one in a message


class StorageError(OSError, ValueError):
    """A disk, permission or service failed: what, where and the remedy."""


class MissingError(StorageError):
    """There is no such file or folder."""


class UnavailableError(StorageError, Restartable):
    """A service did not answer for as long as was waited: it may later."""


def is_url(path: str) -> bool:
    """It has a protocol, as ``s3://bucket/a.tar``."""
    return "://" in path


def protocol(url: str) -> str:
    """``s3`` of ``s3://bucket/a.tar``; ``file`` of a path."""
    return url.partition("://")[0].lower() if is_url(url) else "file"


def server_of(url: str) -> str:
    """``https://host:8000`` of a URL: the web server, or the bucket."""
    return "/".join(url.split("/", 3)[:3])


def local_path(url: str) -> str:
    """The path of ``file:///data/a.tar`` and of a path."""
    return url[len("file://") :] if protocol(url) == "file" and is_url(url) else url


def filled_in(url: str) -> str:
    """``url`` with ``$VAR`` and ``${VAR}`` from the environment: right before it is opened. The result may be secret.

    Raises ValueError that names a variable that is not set.
    """
    return expand_variables(url) if "$" in url else url


def options_filled_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same of storage options, at any depth."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            values[name] = options_filled_in(value)
        else:
            values[name] = filled_in(value) if isinstance(value, str) else value
    return values


def join(url: str, name: str) -> str:
    """The file ``name`` in the folder ``url``, whose query (a signature of the whole folder) stays at the end."""
    if not is_url(url):
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url) if "?" in url else None
    if parts is None:
        return f"{url.rstrip('/')}/{name}"
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def redacted(text: object) -> str:
    """A URL, or a message that holds URLs, without user names, passwords, signatures and tokens."""
    plain = _USER.sub(f"{HIDDEN}@", str(text))
    return _PARAMETER.sub(rf"\1{HIDDEN}", plain)


def has_secret(url: str) -> bool:
    """``url`` itself grants access, so that it must not be saved; not where it only names variables."""
    plain = VARIABLE.sub("", url).replace("://:@", "://").replace("://@", "://")
    return redacted(plain) != plain


def secret_option(options: Mapping[str, Any], where: str = "") -> str | None:
    """The name of an option, at any depth, that holds a secret; not where its value names a variable."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            if inner := secret_option(value, f"{where}{name}."):
                return inner
        elif has_secret(str(value)) or (
            _OPTION.search(name)
            and not VARIABLE.search(str(value))
            and value not in (*_NO_SECRETS, True, False, None)
        ):
            return f"{where}{name}"
    return None


def redacted_command(text: str) -> str:
    """``pipe:COMMAND``, or what it prints, without what looks like a password or token, on one line and cut."""
    plain = " ".join(redacted(text).split())
    for pattern in (_HEADER, _ARGUMENT, _ASSIGNMENT):
        plain = pattern.sub(rf"\1{HIDDEN}", plain)
    return plain if len(plain) <= MAX_COMMAND else f"{plain[:MAX_COMMAND]}..."


def shown(text: str) -> str:
    """A setting for a message, whether it is a URL or a command."""
    return redacted_command(text) if "pipe:" in text else redacted(text)


def command_has_secret(text: str) -> bool:
    """``text`` is a command that holds a password or token itself, so that it must not be saved."""
    return has_secret(text) or any(pattern.search(text) for pattern in (_HEADER, _ARGUMENT, _ASSIGNMENT))
