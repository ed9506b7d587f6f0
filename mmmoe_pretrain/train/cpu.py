"""How a run computes on CPUs (``train.cpu``): measured by rank 0 as a new run starts, and kept by its later starts,
whose losses are then those of an uninterrupted run bit for bit."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import CONFIG
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.engines.base import HALF_TYPES
from mmmoe_pretrain.moe.cpu.calibration import ONEDNN, Calibration, calibrate
from mmmoe_pretrain.moe.cpu.matmul import HAS_ONEDNN
from mmmoe_pretrain.parallel.agreement import from_rank_0
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train.journal import read_events
from mmmoe_pretrain.train.start import config_before, differences

log = logging.getLogger(__name__)
CPU_INFO = Path("/proc/cpuinfo")
OTHER_LOSSES = "losses are no longer those of the starts before bit for bit"

Measure = Callable[[CpuConfig], Calibration]


def settle(
    config: RunConfig,
    layout: Layout,
    host: HostGroups,
    device: torch.device,
    found: Sequence[store.Checkpoint],
    measure: Measure | None = None,
) -> RunConfig:
    """``config`` with what ``train.cpu`` leaves open: as the run that has the checkpoints ``found`` was trained, or
    else as ``measure`` finds it. Unchanged on a GPU and in a dense model. Collective."""
    if device.type != "cpu" or config.moe.dense:
        return config
    dtype = HALF_TYPES.get(config.train.precision, torch.float32)

    def here(settings: CpuConfig) -> Calibration:
        return calibrate(settings, config.moe, config.model.hidden_size, dtype, layout.tensor, layout.expert)

    settings = from_rank_0(host.storage, lambda: _settings(config, found, measure or here))
    return config.model_copy(update={"train": config.train.model_copy(update={"cpu": settings})})


def _settings(config: RunConfig, found: Sequence[store.Checkpoint], measure: Measure) -> CpuConfig:
    """On rank 0."""
    settings = config.train.cpu
    if settings.products == ONEDNN and not HAS_ONEDNN:
        log.warning("train.cpu.products is onednn, which this torch does not have: products are those of torch.mm")
    saved = config.run_dir / CONFIG
    before = config_before(saved, lambda: store.read_meta(found[-1]).get("config")) if found else None
    if before is not None:
        settings = _filled(settings, before.train.cpu)
        models = [event["cpu"] for event in read_events(config.run_dir) if "cpu" in event]
        changes = list(differences(before.train.cpu.model_dump(), settings.model_dump(), "train.cpu."))
        if models and models[-1] != cpu_model():
            changes.append(f"the CPU was {models[-1]} and is {cpu_model()}")
        if changes:
            log.warning("%s: %s", "; ".join(changes), OTHER_LOSSES)
        if _was_trained(config):
            return settings
    found_now = measure(settings)
    for line in found_now.lines:
        log.info("%s", line)
    return found_now.settings


def _filled(settings: CpuConfig, saved: CpuConfig) -> CpuConfig:
    """``settings``, and where they are open those of ``saved``."""
    products = saved.products if settings.products == "auto" else settings.products
    rows = saved.rows_for_all_threads if settings.rows_for_all_threads is None else settings.rows_for_all_threads
    return CpuConfig(products=products, rows_for_all_threads=rows)


def _was_trained(config: RunConfig) -> bool:
    """Not where ``mmmoe import`` or ``mmmoe experts`` made the checkpoint. What a trained run left open, of a version
    that measured nothing, stays open: it then computes as before."""
    return any(event["event"] in ("started", "resumed") for event in read_events(config.run_dir))


def facts(device: torch.device) -> dict[str, str]:
    """Of a start, for the journal."""
    return {"cpu": cpu_model()} if device.type == "cpu" else {}


def cpu_model() -> str:
    """Such as ``AMD EPYC 9554 64-Core Processor``."""
    lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
