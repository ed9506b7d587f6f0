"""A tar into a folder, and never outside it: Python 3.11.2 (Debian 12) has no extraction filters yet."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path, PurePosixPath


def unpack_tar(tar: tarfile.TarFile, target: Path) -> None:
    """Extract all of ``tar``; a member that is not a plain file or folder below ``target`` is a ValueError."""
    if hasattr(tarfile, "data_filter"):  # 3.11.4 and later
        try:
            tar.extractall(target, filter="data")
        except tarfile.FilterError as error:
            raise ValueError(str(error)) from None
        return
    members = tar.getmembers()
    for member in members:
        path = PurePosixPath(member.name)
        if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{member.name!r} is not a plain file or folder inside the archive")
        # As the filter has it: the files are ours, and nothing is setuid, writable by others or locked.
        member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    tar.extractall(target, members)
