"""Peak memory of a rank, for records: of torch's allocator on a GPU, else of the process.

A process holds libraries, too. What a plan of a run on CPUs is compared with is the growth of the resident set since
before the model was built in this process, also after a resume.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch

GROWN = "grown"
STATM = Path("/proc/self/statm")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes, since this process began: of a GPU those of torch's allocator, else of the process (its largest
    resident set)."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"allocated": float(allocated), "reserved": float(reserved)}
    return {"resident": largest_resident()}


def resident() -> float:
    """Bytes of the process now; its largest so far where the system does not tell."""
    if not STATM.exists():
        return largest_resident()
    return float(STATM.read_text().split()[1]) * resource.getpagesize()


def largest_resident() -> float:
    """Bytes of the process at its peak."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(largest: float, before_model: float, before_steps: float) -> float:
    """Bytes from ``before_model`` to the peak of the steps; 0 where it is not known, since loading a checkpoint or
    the libraries took more (``before_steps``: the largest until then)."""
    return largest - before_model if largest > before_steps else 0.0
