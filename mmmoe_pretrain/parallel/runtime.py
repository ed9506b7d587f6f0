"""Starting and ending the process group: the one place that chooses device and backend. And the warnings of
megatron-core that users cannot act on: they are suppressed."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

DEVICES = ("auto", "cpu", "cuda")  # auto: a GPU where there is one
COUNTS_OF_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes of this start
OPTIONAL = (
    "(?s).*(Transformer Engine|Apex|apex|moe_ffn_hidden_size|full scope is deprecated|without fp32 routing|"
    "sequence parallelism must be used|MimoModelConfig is experimental)"
)
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats its results (its documentation, section 2.1.4)
# mallopt(3): bytes at the end of the heap that are kept when they are free, and the size from which on a block is
# mapped and unmapped by itself; 32 MiB is the most that glibc takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED_ALONE = 1 << 30, 32 << 20
MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")  # of users
RENAMED = r"`torch\.distributed\.\w+` is deprecated"


def local_device() -> torch.device:
    """The GPU of this rank, or the CPU where there is none. ValueError for more ranks than GPUs."""
    gpus, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if sees_one_gpu():
        return torch.device("cuda", 0)
    if rank >= gpus:
        raise ValueError(
            f"local rank {rank} has no GPU: this machine has {gpus}; start {gpus} rank{'s' * (gpus > 1)} "
            f"(launch/torchrun.sh {gpus} ...), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", rank)


def named_device(name: str) -> torch.device:
    """The device that ``--device`` names, of a process that runs a model alone: "auto", "cpu" or "cuda"."""
    if name not in DEVICES:
        raise ValueError(f"--device {name}: choose one of {', '.join(DEVICES)}")
    gpus = torch.cuda.device_count()
    if name == "cuda" and not gpus:
        build = "sees none" if torch.version.cuda or torch.version.hip else "is a build for CPUs"
        raise ValueError(
            f"--device cuda: there is no GPU to use, torch {torch.__version__} {build}; use --device cpu, or install "
            f"a torch for the driver of this machine and see what CUDA_VISIBLE_DEVICES hides"
        )
    if name == "cpu" or not gpus:
        return torch.device("cpu")
    _set_gpu(device := torch.device("cuda", 0))
    return device


def _set_gpu(device: torch.device) -> None:
    torch.cuda.set_device(device)
    # It makes a plan for every new shape of a masked call, 90 ms each (measured on an H100).
    torch.backends.cuda.enable_cudnn_sdp(False)


def sees_one_gpu() -> bool:
    """Whether the launcher shows this process one GPU by CUDA_VISIBLE_DEVICES, as Slurm's --gpus-per-task=1 does:
    each rank of a machine may then have its own (``_refuse_shared_gpu``)."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return len(named) == 1 and torch.cuda.device_count() == 1


def _refuse_shared_gpu(gpu: str, store: dist.Store) -> None:
    """ValueError where an earlier rank of this machine has the same ``gpu``; NCCL would fail later."""
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    store.set(f"gpu of rank {rank}", gpu)
    for other in range(rank - local, rank):
        if store.get(f"gpu of rank {other}").decode() == gpu:
            raise ValueError(
                f"ranks {other} and {rank} have the same GPU, the only one that they see: CUDA_VISIBLE_DEVICES is "
                f"{os.environ.get('CUDA_VISIBLE_DEVICES')}; show each rank a GPU of its own, or all of them to every "
                f"rank, or start one rank"
            )


def _refuse_many_alone() -> None:
    """Many processes of a launcher that each take themselves for the only one would write one run's folder."""
    for variable in () if "WORLD_SIZE" in os.environ else COUNTS_OF_LAUNCHERS:
        if int(os.environ.get(variable, "1")) > 1:
            raise ValueError(
                f"{variable} is {os.environ[variable]}, and WORLD_SIZE is not set: every process would train alone "
                f"into the same folder; start the ranks by torchrun (launch/torchrun.sh), and that once a machine"
            )


def allow_many_files() -> None:
    """Each gloo group of all ranks is a socket to every other rank: 1,000 ranks exceed the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # not every system allows its own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
    """By default glibc returns the end of its heap to the system where more than 64 MiB of it are free, so that
    each step maps its activations anew, page by page. A small model with a vocabulary of 8,000 took a fifth less CPU
    time a step with 1 GiB kept. Settings of malloc in the environment are left as they are."""
    if any(name in os.environ for name in MALLOC_SETTINGS):
        return
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE)


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
        _set_gpu(device)
    else:
        keep_freed_memory()
    timeout = timedelta(minutes=timeout_minutes)
    _refuse_many_alone()
    allow_many_files()
    bound = device if backend == "nccl" else None  # it connects at once, and no barrier guesses its device
    if "WORLD_SIZE" in os.environ:
        if bound is not None and sees_one_gpu():
            if store is None:  # as init_process_group makes it
                store = dist.PrefixStore("default_pg", next(dist.rendezvous("env://", timeout=timeout))[0])
                store.set_timeout(timeout)
            _refuse_shared_gpu(str(torch.cuda.get_device_properties(device).uuid), store)
        rank, size = (int(os.environ[name]) if store else -1 for name in ("RANK", "WORLD_SIZE"))
    else:
        store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size, device_id=bound)
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
def unbound_device() -> Iterator[None]:
    """Around the making of gloo groups of some ranks: with a device bound to the default group the others would split
    NCCL's communicator for them, and wait for ranks that do not (pytorch issue 145376)."""
    world: Any = distributed_c10d._get_default_group()
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound


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
    """Around imports of megatron-core and the making of its configs. A sixth of the time of the imports would be
    garbage collections that find nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=OPTIONAL)
            yield
    finally:
        if collects:
            gc.enable()


def silence_calls() -> None:
    """For the rest of the process: megatron-core calls collectives by names that torch has since changed,
    and gives a hint on CUDA's queues without CUDA too. A filter for good, since most of this happens in
    backward passes."""
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
    # Its sharded optimizer looks for gradients on views of parameters, where there are none.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=r"megatron\.core\.optimizer")
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
