"""Environments of their own for libraries that benchmarks and tests compare with: made once, and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_MEDIA = ("pillow==13.0.0", "soundfile==0.14.0")
_TORCH = ("torch==2.13.0", "sentencepiece==0.2.3", *_MEDIA)
PACKAGES: dict[str, tuple[str, ...]] = {
    "energon": ("megatron-energon==7.4.1", *_TORCH),
    "litdata": ("litdata==0.2.76", *_TORCH),
    "wids": ("webdataset==0.2.111", "torch==2.13.0"),  # the last version of webdataset that has wids
    "datasets": ("datasets==5.2.0", *_MEDIA),
    "img2dataset": ("img2dataset==1.47.0",),
}
_LONGEST_SECONDS = 1800.0


def environment_of(name: str, folder: Path) -> str:
    """The interpreter of an environment with the packages of ``name``, made below ``folder`` where it is missing.
    Raises RuntimeError with what pip said, and subprocess.TimeoutExpired."""
    place = folder / f"env_{name}"
    python = str(place / "bin" / "python")
    if not (place / "complete").is_file():
        make = [sys.executable, "-m", "venv", "--clear", str(place)]
        for command in (make, [python, "-m", "pip", "install", "-q", *PACKAGES[name]]):
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
            if done.returncode:
                lines = (done.stdout + done.stderr).strip().splitlines()
                raise RuntimeError(f"no environment with {name}: {' '.join(lines[-2:]) or 'no message'}")
        (place / "complete").touch()
    return python
