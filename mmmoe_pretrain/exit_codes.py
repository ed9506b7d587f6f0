"""Exit codes for launchers and schedulers.

torchrun turns every failure of a worker into 1, and restarts workers that fail, stopped ones included. So under
``launch/torchrun.sh``, which names a file in MMMOE_EXIT_FILE, a worker writes its code there and exits with 0 where
it must not be restarted; the script exits with the code of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

DONE = 0
FAULT = 1  # a defect, or a fault that a restart from the last checkpoint may fix
USER_ERROR = 2  # a restart would end the same way
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal (SIGTERM, SIGUSR1) after saving; start it again
HUNG = 76  # a rank made no progress

EXIT_FILE = "MMMOE_EXIT_FILE"


class Restartable(ValueError):
    """An error after which the run may resume from its last checkpoint in new processes."""


def record(code: int) -> int:
    """Write ``code`` for the launcher, if there is one; the code that this process must exit with."""
    path = os.environ.get(EXIT_FILE)
    if path is None:
        return code
    draft = Path(f"{path}.{os.getpid()}")
    draft.write_text(f"{code}\n", encoding="ascii")
    os.replace(draft, path)
    return DONE if code == STOPPED else code


def ended_for_good() -> bool:
    """Whether torchrun restarted this worker after an error that no restart fixes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _recorded() == USER_ERROR


def forget_earlier() -> None:
    """The first process of a machine deletes the code of an earlier start, so that it is not taken for this one's."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and _recorded() not in (None, USER_ERROR):
        Path(os.environ[EXIT_FILE]).unlink()


def _recorded() -> int | None:
    path = Path(os.environ.get(EXIT_FILE, os.devnull))
    return int(path.read_text(encoding="ascii")) if path.is_file() else None
