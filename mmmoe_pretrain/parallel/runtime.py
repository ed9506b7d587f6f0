"""Starting and ending the process group: the one place that chooses device and backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def local_device() -> torch.device:
    """The GPU of this rank, or the CPU where there is none. ValueError for more ranks than GPUs."""
    gpus, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if rank >= gpus:
        raise ValueError(
            f"local rank {rank} has no GPU: this machine has {gpus}; start {gpus} rank{'s' * (gpus > 1)} "
            f"(launch/torchrun.sh {gpus} ...), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", rank)


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[torch.device]:
    """The default process group, from torchrun's environment or of this process alone.

    NCCL on GPUs, gloo on CPUs. A collective that outlasts ``timeout_minutes`` ends the job: gloo
    raises, NCCL's watchdog ends the process. After an error NCCL's communicators are left to the
    process's end: tearing them down while peers wait in a collective can hang and hide the error.
    """
    device = local_device()
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    finished = False
    try:
        yield device
        finished = True
    finally:
        if finished or backend == "gloo":
            dist.destroy_process_group()
