"""Exit codes for launchers and schedulers.

torchrun turns every failure of a worker into 1, and restarts workers that fail, stopped ones included. So under
``launch/torchrun.sh``, which names a file in MMMOE_EXIT_FILE, a worker writes its code there and exits with 0 where
it must not be restarted; the script exits with the code of the file.

Of many machines each has its own script and file. An error of one rank that no restart fixes must end them all, while
torchrun restarts the ranks of every machine, which would then wait for those that have ended. So that code is also
written to torchrun's rendezvous store, at the address in MMMOE_RENDEZVOUS, and workers that start look there.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

DONE = 0
FAULT = 1  # a defect, or a fault that a restart from the last checkpoint may fix
USER_ERROR = 2  # a restart would end the same way
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal (SIGTERM, SIGUSR1) after saving; start it again
HUNG = 76  # a rank made no progress

EXIT_FILE = "MMMOE_EXIT_FILE"
STOP_FILE = "MMMOE_STOP_FILE"  # which exists once the script was asked to stop; it holds the name of the signal
RENDEZVOUS = "MMMOE_RENDEZVOUS"
KEY = "mmmoe/user_error"  # in the store: the rank that ended by such an error
FIRST_RANK_SECONDS = 0.3  # that the others leave to the first rank of their machine, to tell an error
SECONDS = 10  # that the store may take to answer
PR_SET_PDEATHSIG = 1  # of Linux: prctl(2)
log = logging.getLogger(__name__)


class Restartable(ValueError):
    """An error after which the run may resume from its last checkpoint in new processes."""


def record(code: int, final: bool = False) -> int:
    """Write ``code`` for the launcher, if there is one; the code that this process must exit with. ``final``: no
    restart by torchrun, as after STOPPED."""
    if EXIT_FILE not in os.environ:
        return code
    _write(code)
    if code == USER_ERROR and RENDEZVOUS in os.environ:
        _ask_nodes(tell=True)
    return DONE if final or code == STOPPED else code


def tell(error: ValueError) -> None:
    """Print an error; where ranks of torchrun have the same one, once a machine, if possible by its first rank."""
    rank = os.environ.get("RANK")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_RANK_SECONDS)
    if _is_first(str(error)):
        print(f"mmmoe: {'rank ' + rank + ': ' if rank else ''}{error}", file=sys.stderr)


def _is_first(message: str) -> bool:
    """Whether no other rank of this machine has told ``message`` in this start: the folder of torchrun's own files of
    it then has a mark. Without torchrun, or where it has no such folder, every rank counts as the first."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/LOCAL_RANK/error.json
    if own is None:
        return True
    mark = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        (Path(own).parents[1] / f"told_{mark}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except (OSError, IndexError):
        return True
    return True


def ended_for_good() -> bool:
    """Whether torchrun restarted this worker after an error that no restart fixes, of this machine or another."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and recorded() == USER_ERROR:
        return True
    if EXIT_FILE not in os.environ or RENDEZVOUS not in os.environ or not (rank := _ask_nodes()):
        return False
    if os.environ.get("LOCAL_RANK") == "0":
        log.error("rank %s ended by an error that a restart does not fix, which its machine's log tells", rank)
    _write(USER_ERROR)
    return True


def recorded() -> int | None:
    """The code that a worker of this machine ended with."""
    path = Path(os.environ.get(EXIT_FILE, os.devnull))
    return int(path.read_text(encoding="ascii")) if path.is_file() else None


def forget_earlier() -> None:
    """The first process of a machine deletes the code of an earlier start, so that it is not taken for this one's."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and recorded() not in (None, USER_ERROR):
        Path(os.environ[EXIT_FILE]).unlink()


def end_with_parent() -> None:
    """This process is killed when the one that started it ends. A script or torchrun that is killed, as by the kernel
    where memory is out, ends nothing itself, and ranks would train on that no signal reaches."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _write(code: int) -> None:
    path = os.environ[EXIT_FILE]
    draft = Path(f"{path}.{os.getpid()}")
    draft.write_text(f"{code}\n", encoding="ascii")
    os.replace(draft, path)


def _ask_nodes(tell: bool = False) -> str:
    """Which rank of any machine ended by an error of the user, as the store of torchrun knows; empty for none.
    ``tell``: this one did."""
    import torch.distributed as dist

    host, _, port = os.environ[RENDEZVOUS].rpartition(":")
    try:
        store = dist.TCPStore(host, int(port), timeout=timedelta(seconds=SECONDS), wait_for_workers=False)
        if tell:
            store.set(KEY, os.environ.get("RANK", "0"))
        return store.get(KEY).decode() if store.check([KEY]) else ""
    except dist.DistError as error:  # torchrun's process of node 0 has ended, and all will
        log.warning("no answer from torchrun of node 0 at %s (%s)", os.environ[RENDEZVOUS], str(error).split("\n")[0])
        return ""
