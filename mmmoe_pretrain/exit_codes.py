"""How a process of a run ends, in numbers that launchers and schedulers act upon.

torchrun makes 1 of every worker's failure, and starts workers again that fail, stopped ones included. So
under ``launch/torchrun.sh``, which names a file in MMMOE_EXIT_FILE, a worker writes its code there, ends
with 0 where no new start is wanted, and the script ends with the code of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

DONE = 0
FAULT = 1  # a defect, or a fault that a new start from the last checkpoint may mend
USER_ERROR = 2  # a new start would end the same way
STOPPED = 75  # EX_TEMPFAIL: told to stop (SIGTERM, SIGUSR1), and saved; start it again
HUNG = 76  # a rank made no progress

EXIT_FILE = "MMMOE_EXIT_FILE"


class Restartable(ValueError):
    """What went wrong, in a line; the run may go on from its last checkpoint in new processes."""


def record(code: int) -> int:
    """Tell the launcher, if one listens, why this process ends; the code for the process itself."""
    path = os.environ.get(EXIT_FILE)
    if path is None:
        return code
    draft = Path(f"{path}.{os.getpid()}")
    draft.write_text(f"{code}\n", encoding="ascii")
    os.replace(draft, path)
    return DONE if code == STOPPED else code


def ended_for_good() -> bool:
    """Is this a worker that torchrun started again after an error that no new start mends?"""
    path = os.environ.get(EXIT_FILE)
    if path is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not Path(path).is_file():
        return False
    return Path(path).read_text(encoding="ascii").strip() == str(USER_ERROR)


def forget_earlier() -> None:
    """The first process of a machine clears what an earlier start wrote, or a hang long ago would name the end."""
    path = os.environ.get(EXIT_FILE)
    if path is None or os.environ.get("LOCAL_RANK", "0") != "0" or not Path(path).is_file():
        return
    if Path(path).read_text(encoding="ascii").strip() != str(USER_ERROR):
        Path(path).unlink()
