"""What ``train.cpu`` leaves open is measured once a run, on rank 0, and kept by later starts."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.checkpoint.store import Checkpoint, candidates, read_meta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.cpu.calibration import Calibration
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train import cpu
from mmmoe_pretrain.train.journal import Journal
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import tiny_config
from tests.train.faulty import config_in, events, losses

CPU = torch.device("cpu")
OPEN = CpuConfig()
BY_TORCH = CpuConfig(products="torch", rows_for_all_threads=12)
BY_ONEDNN = CpuConfig(products="onednn", rows_for_all_threads=6)


def with_cpu(config: RunConfig, settings: CpuConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"cpu": settings})})


def settled(config: RunConfig, found: tuple[Checkpoint, ...], measured: CpuConfig) -> CpuConfig:
    """In one process, where a measurement would find ``measured``."""
    layout = resolve_degrees(config.parallel, config.moe.num_experts, 1)
    times = {"torch": 2e-3, "onednn": 1e-3}
    return cpu.settle(config, layout, HostGroups(), CPU, found, lambda _: Calibration(measured, times)).train.cpu


def earlier(config: RunConfig, settings: CpuConfig, model: str | None = None) -> tuple[Checkpoint, ...]:
    """A run that was trained with ``settings``, on a CPU of this ``model``; its checkpoints."""
    config.run_dir.mkdir(parents=True)
    run_config.dump(with_cpu(config, settings), config.run_dir / "config.yaml")
    Journal(config.run_dir).write("started", step=0, cpu=model or cpu.cpu_model())
    return (Checkpoint(config.checkpoint_root, "step-00000004", 4),)


@pytest.fixture
def open_config(tmp_path: Path) -> RunConfig:
    return with_cpu(tiny_config(tmp_path), OPEN)


def test_a_new_run_takes_and_logs_what_it_measures(open_config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert settled(open_config, (), BY_ONEDNN) == BY_ONEDNN
    assert "products in fp32: onednn (torch 2.00 ms, onednn 1.00 ms)" in caplog.text


def test_a_resumed_run_takes_the_saved_choice_though_it_would_choose_otherwise_now(
    open_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    found = earlier(open_config, BY_TORCH)
    assert settled(open_config, found, BY_ONEDNN) == BY_TORCH
    assert not caplog.records


def test_a_run_of_a_version_that_measured_nothing_goes_on_without(open_config: RunConfig) -> None:
    assert settled(open_config, earlier(open_config, OPEN), BY_ONEDNN) == OPEN


def test_a_run_that_was_imported_and_never_trained_is_measured(open_config: RunConfig) -> None:
    found = earlier(open_config, OPEN)
    (open_config.run_dir / "events.jsonl").unlink()
    assert settled(open_config, found, BY_ONEDNN) == BY_ONEDNN


def test_an_explicit_change_is_taken_with_a_warning(open_config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    found = earlier(open_config, BY_TORCH)
    changed = CpuConfig(products="onednn", rows_for_all_threads=12)
    assert settled(with_cpu(open_config, CpuConfig(products="onednn")), found, BY_TORCH) == changed
    assert "train.cpu.products was 'torch' and is 'onednn': losses are no longer" in caplog.text


def test_another_cpu_is_warned_of(open_config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    settled(open_config, earlier(open_config, BY_TORCH, "Some CPU 1"), BY_TORCH)
    assert f"the CPU was Some CPU 1 and is {cpu.cpu_model()}: losses are no longer" in caplog.text


def test_gpus_and_dense_models_measure_nothing(tmp_path: Path, open_config: RunConfig) -> None:
    layout = resolve_degrees(open_config.parallel, open_config.moe.num_experts, 1)

    def measure(_: CpuConfig) -> Calibration:
        pytest.fail("there is nothing to measure")

    dense = with_cpu(tiny_config(tmp_path, moe={"num_experts": 1, "experts_per_token": 1}), OPEN)
    assert cpu.settle(open_config, layout, HostGroups(), torch.device("cuda"), (), measure) == open_config
    assert cpu.settle(dense, layout, HostGroups(), CPU, (), measure) == dense


def test_the_model_of_the_cpu_is_that_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 2 @ 3.00GHz\nmodel name\t: other\n")
    monkeypatch.setattr(cpu, "CPU_INFO", info)
    assert cpu.cpu_model() == "Some CPU: 2 @ 3.00GHz"
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "none")
    assert cpu.cpu_model()


def test_an_unknown_library_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        tiny_config(tmp_path, train={"cpu": {"products": "mkl"}})
    assert str(error.value) == "config: train.cpu.products: Input should be 'auto', 'torch' or 'onednn' (got 'mkl')"


def of_this_rank(config: RunConfig) -> CpuConfig:
    with process_group(timeout_minutes=0.5) as device:
        choices = [BY_TORCH, BY_ONEDNN]  # by rank
        layout = resolve_degrees(config.parallel, config.moe.num_experts, dist.get_world_size())
        host = HostGroups(storage=dist.group.WORLD)
        own = Calibration(choices[dist.get_rank()], {})
        return cpu.settle(config, layout, host, device, (), lambda _: own).train.cpu


def test_two_ranks_take_the_choice_of_rank_0(open_config: RunConfig) -> None:
    assert run_ranks(2, of_this_rank, open_config) == [BY_TORCH, BY_TORCH]


def trained(config: RunConfig, choice: CpuConfig) -> set[CpuConfig]:
    """Train where a measurement finds ``choice``; the settings of all experts and routers that computed."""
    seen: set[CpuConfig] = set()
    for kind in (Experts, Router):
        plain = kind.forward

        def forward(self: Any, *args: Any, plain: Any = plain) -> Any:
            seen.add(self.cpu_config)
            return plain(self, *args)

        kind.forward = forward  # type: ignore[method-assign]
    cpu.calibrate = lambda *_: Calibration(choice, {})  # type: ignore[attr-defined]
    assert train(config) == 0
    return seen


def test_the_choice_is_in_the_run_its_checkpoints_and_its_evaluation_and_is_trained_again(
    tmp_path: Path, tiny_data: Path
) -> None:
    settings = {"cpu": {"products": "auto"}}
    constant = {"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"}
    whole, part = (config_in(tmp_path / name, tiny_data, train={**settings, "steps": steps}, optimizer=constant)
                   for name, steps in (("whole", 8), ("part", 4)))  # fmt: skip
    assert run_ranks(1, trained, whole, BY_TORCH) == [{BY_TORCH}]
    assert run_ranks(1, trained, part, BY_TORCH) == [{BY_TORCH}]
    resumed = part.model_copy(update={"train": whole.train})
    assert run_ranks(1, trained, resumed, BY_ONEDNN) == [{BY_TORCH}]
    assert losses(resumed).tolist() == losses(whole).tolist()

    model, saved, _ = load_model(resumed.run_dir)
    assert saved.train.cpu == BY_TORCH
    assert {router.cpu_config for router in model.routers} == {BY_TORCH}
    newest = candidates(resumed.checkpoint_root)[-1]
    assert CpuConfig.model_validate(read_meta(newest)["config"]["train"]["cpu"]) == BY_TORCH
    assert [event["cpu"] for event in events(resumed, "started", "resumed")] == [cpu.cpu_model()] * 2
    assert cpu.facts(torch.device("cuda")) == {}
