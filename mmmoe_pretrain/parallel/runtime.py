"""Starting and ending the process group: the one place that chooses device and backend. And the warnings of
megatron-core that users cannot act on: they are suppressed."""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COUNTS_OF_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes of this start
OPTIONAL = (
    "(?s).*(Transformer Engine|Apex|apex|moe_ffn_hidden_size|full scope is deprecated|without fp32 routing|"
    "sequence parallelism must be used|MimoModelConfig is experimental)"
)
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats its results (its documentation, section 2.1.4)
RENAMED = r"`torch\.distributed\.\w+` is deprecated"


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


def _refuse_many_alone() -> None:
    """Many processes of a launcher that each take themselves for the only one would write one run's folder."""
    for variable in () if "WORLD_SIZE" in os.environ else COUNTS_OF_LAUNCHERS:
        if int(os.environ.get(variable, "1")) > 1:
            raise ValueError(
                f"{variable} is {os.environ[variable]}, and WORLD_SIZE is not set: every process would train alone "
                f"into the same folder; start the ranks by torchrun (launch/torchrun.sh), and that once a machine"
            )


def _allow_many_files() -> None:
    """Each gloo group of all ranks is a socket to every other rank: 1,000 ranks exceed the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # not every system allows its own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def process_group(timeout_minutes: float, store: dist.Store | None = None) -> Iterator[torch.device]:
    """The default process group, from torchrun's environment or of this process alone. ``store``: in place of one at
    MASTER_ADDR, for a group that another follows in this process.

    NCCL on GPUs, gloo on CPUs. A collective that outlasts ``timeout_minutes`` ends the job: gloo
    raises, NCCL's watchdog ends the process. After an error NCCL's communicators are left to the
    process's end: tearing them down while peers wait in a collective can hang and hide the error.
    """
    device = local_device()
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
        # It makes a plan for every new shape of a masked call, 90 ms each (measured on an H100).
        torch.backends.cuda.enable_cudnn_sdp(False)
    timeout = timedelta(minutes=timeout_minutes)
    _refuse_many_alone()
    _allow_many_files()
    if "WORLD_SIZE" in os.environ:
        rank, size = (int(os.environ[name]) if store else -1 for name in ("RANK", "WORLD_SIZE"))
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    finished = False
    try:
        if backend == "gloo":
            dist.barrier()  # a rank that fails before the others have connected to it would leave them waiting
        yield device
        finished = True
    finally:
        if finished or backend == "gloo":
            dist.destroy_process_group()


@contextmanager
def deterministic_operations(wanted: bool) -> Iterator[None]:
    """Where ``wanted``, operations that give the same bits each time (``torch.use_deterministic_algorithms``), and
    an error from those that cannot. Enter it before the first product on a GPU: cuBLAS reads its variable then."""
    if not wanted:
        yield
        return
    given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if given not in CUBLAS_WORKSPACES:
        raise ValueError(
            f"train.deterministic: CUBLAS_WORKSPACE_CONFIG is {given}, with which products are not deterministic; "
            f"unset it, or set it to {' or '.join(CUBLAS_WORKSPACES)}"
        )
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it would write every new tensor once more
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled


@contextmanager
def silence_megatron() -> Iterator[None]:
    """Around imports of megatron-core and the making of its configs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OPTIONAL)
        yield


def silence_calls() -> None:
    """For the rest of the process: megatron-core calls collectives by names that torch has since changed,
    and gives a hint on CUDA's queues without CUDA too. A filter for good, since most of this happens in
    backward passes."""
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
    # Its sharded optimizer looks for gradients on views of parameters, where there are none.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=r"megatron\.core\.optimizer")
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
