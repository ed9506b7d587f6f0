"""Where this process stands: the Python stack of every thread, and torch's record of its collectives."""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
from pathlib import Path
from types import FrameType

import torch._C._distributed_c10d as c10d

_COLLECTIVES = "/torch/distributed/"


def write_stacks(path: Path, title: str) -> None:
    """Of all threads; needs no cooperation of theirs."""
    with path.open("w", encoding="utf-8") as file:
        file.write(title + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def flight_record() -> bytes:
    """The latest collectives of this process, gloo's and NCCL's, as JSON; empty without a recorder. torch keeps
    TORCH_FR_BUFFER_SIZE of them: 2000, unless it is set."""
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return b"" if dump is None else bytes(dump())


def pending_collective(record: bytes) -> str:
    """The oldest one in ``record`` that has not ended, e.g. "gloo:all_reduce #4 of default_pg". Those of other
    Python threads (a save in flight) do not count; autograd's threads are not Python's."""
    others = {
        str(thread.ident)
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not isinstance(thread, threading._DummyThread)
    }
    for entry in json.loads(record)["entries"] if record else ():
        if not entry["retired"] and entry.get("thread_id") not in others:
            number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
            name = " ".join(dict.fromkeys(part for part in reversed(entry["process_group"]) if part))
            return f"{entry['profiling_name']} #{number} of group {name}"
    return ""


def main_thread() -> tuple[str, bool]:
    """Where the main thread stands outside of torch, e.g. "loop.py:120 _run", and whether in a collective."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    collective = False
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        collective = collective or _COLLECTIVES in file
        if "/torch/" not in file:
            return f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}", collective
        frame = frame.f_back
    return "", collective
