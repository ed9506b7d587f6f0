"""The start of a job."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mmmoe_pretrain.parallel.runtime import MALLOC_SETTINGS, local_device, named_device, process_group, unbound_device


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_many_processes_without_ranks_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValueError, match=f"{variable} is 4, .*start the ranks by torchrun"), process_group(1):
        pytest.fail("it started")
    monkeypatch.setenv(variable, "1")
    with process_group(1) as device:
        assert device.type in ("cpu", "cuda")


@pytest.fixture
def gpu_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPUs that this process sees; torch is told of as many, and not of any kernel."""
    names: list[str] = []
    properties = lambda device: SimpleNamespace(uuid=names[device.index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return names


@pytest.mark.parametrize(
    "visible,gpus,local_rank,device",
    [("", 0, 3, "cpu"), ("0,1,2,3", 4, 3, "cuda:3"), ("6", 1, 3, "cuda:0"), ("GPU-5c", 1, 0, "cuda:0")],
)
def test_each_rank_takes_its_gpu(
    visible: str, gpus: int, local_rank: int, device: str, gpu_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_names += [f"GPU {i}" for i in range(gpus)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert local_device() == torch.device(device)


def test_more_ranks_than_gpus_are_refused(gpu_names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    for visible, gpus in (("0,1", 2), (None, 1)):  # without the variable one GPU is all that the machine has
        gpu_names[:] = [f"GPU {i}" for i in range(gpus)]
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=rf"local rank 2 has no GPU: this machine has {gpus}; start {gpus} rank"):
            local_device()


def started(monkeypatch: pytest.MonkeyPatch, store: dist.Store | None = None) -> dict[str, Any]:
    """What ``process_group`` starts torch's process group with."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: given.update(rest, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    with process_group(1, store):
        return given


def test_nccl_is_given_the_device_and_gloo_is_not(gpu_names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = started(monkeypatch)
    assert (given["backend"], given["device_id"]) == ("gloo", None)
    gpu_names += ["one", "two"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    given = started(monkeypatch)
    assert (given["backend"], given["device_id"]) == ("nccl", torch.device("cuda", 1))


def test_ranks_that_see_the_same_gpu_are_refused(gpu_names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    # Of two machines with three ranks each; the last rank sees the GPU of the one before it.
    for rank, gpu in enumerate(["a", "b", "c", "d", "e", "e"]):
        gpu_names[:] = [gpu]
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 3))
        if rank < 5:
            given = started(monkeypatch, store)
            assert (given["device_id"], given["rank"]) == (torch.device("cuda", 0), rank)
        else:
            with pytest.raises(ValueError, match=r"ranks 4 and 5 have the same GPU.*show each rank a GPU of its own"):
                started(monkeypatch, store)


def test_a_bound_device_is_set_aside_and_comes_back() -> None:
    with process_group(1):
        world: Any = distributed_c10d._get_default_group()
        world.bound_device_id = torch.device("cuda", 0)
        with unbound_device():
            assert world.bound_device_id is None
        assert world.bound_device_id == torch.device("cuda", 0)
        world.bound_device_id = None


def test_a_command_takes_the_device_that_is_named(gpu_names: list[str]) -> None:
    assert named_device("auto") == named_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"--device cuda: there is no GPU .*use --device cpu, or install a torch"):
        named_device("cuda")
    with pytest.raises(ValueError, match="--device gpu: choose one of auto, cpu, cuda"):
        named_device("gpu")
    gpu_names += ["one", "two"]
    assert named_device("auto") == named_device("cuda") == torch.device("cuda", 0)
    assert named_device("cpu") == torch.device("cpu")


FAULTS = """
import resource, torch
from mmmoe_pretrain.parallel.runtime import keep_freed_memory

torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(6):
        blocks = [torch.ones(size << 18) for size in (30, 3, 5, 20) * 6]  # MiB, 350 in all
        while blocks:
            blocks.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def test_memory_of_a_step_is_not_mapped_again_at_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pages of 4 KiB: six times 350 MiB are 535,000."""
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    assert faults_of_a_process() < 1000
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")  # the user's own setting stands
    assert faults_of_a_process() > 50_000


def faults_of_a_process() -> int:
    return int(subprocess.run([sys.executable, "-c", FAULTS], stdout=subprocess.PIPE, check=True).stdout)
