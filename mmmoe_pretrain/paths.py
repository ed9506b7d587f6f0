"""The one rule for paths that a user gives, in a config or on a command line; and where this code itself is."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expand(path: str) -> str:
    """The path, or each of ``a::b``, with ``~``, ``~user``, ``$VAR`` and ``${VAR}`` filled in; URLs (``s3://...``)
    and commands (``pipe:...``) stay as they are.

    Expanding the result changes nothing, so a saved config can be read again. Raises ValueError that names a
    variable that is not set, or an unknown user.
    """
    if path.startswith("pipe:") or "::pipe:" in path:
        return path  # a shell fills it in
    if "::" in path:
        return "::".join(map(expand, path.split("::")))
    if "://" in path:
        return path
    full = os.path.expanduser(expand_variables(path))
    if full.startswith("~"):
        raise ValueError(f"{path}: no such user; a folder whose name begins with ~ is ./{full}")
    left = VARIABLE.search(full)
    if left:
        raise ValueError(f"{path}: a value that is filled in holds {left[0]}; write that path out")
    return full


def expand_variables(text: str) -> str:
    """The text with ``$VAR`` and ``${VAR}`` filled in. Raises ValueError that names a variable that is not set."""
    return VARIABLE.sub(_value, text)


def given(value: Any) -> Any:
    """``callback`` of a typer parameter: a path, or a list of paths, expanded."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [given(item) for item in value]
    return type(value)(expand(str(value)))


def make_folder(path: Path) -> None:
    """Make a folder to write results into, if it is missing. Raises ValueError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror}; choose another --out") from None
    try:
        tempfile.TemporaryFile(dir=path).close()  # root has access by every mode, and some file systems hold no files
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; choose another --out, or change its owner or mode"
        ) from None


@contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder ``OUT.tmp`` to write in, which becomes ``out`` where the block succeeds, else nothing is left of it.
    ``replace``: in place of an earlier one."""
    draft, aside = out.with_name(f"{out.name}.tmp"), out.with_name(f"{out.name}.old")
    shutil.rmtree(draft, ignore_errors=True)
    make_folder(draft)
    try:
        yield draft
        if replace and out.exists():  # a rename cannot replace a folder that is not empty
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(out, aside)
        os.replace(draft, out)
        if replace:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A file ``OUT.tmp`` to write, which becomes ``out`` where the block succeeds, else nothing is left of it."""
    draft = out.with_name(f"{out.name}.tmp")
    if out.is_dir():
        raise ValueError(f"{out} is a folder, and a file is to be written there; remove it, or choose another --out")
    make_folder(out.parent)
    try:
        yield draft
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"{match.string}: the environment variable {name} is not set; set it, or write the path out")
    return value


def python_path() -> str:
    """PYTHONPATH for a process that runs this code: where it is, then what is set."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
