"""Expert budgets: groups of experts whose size is ``auto`` get experts in proportion to the tokens of their
modalities (``config/expert_groups.py``). Rank 0 packs the first samples of the training mix and counts; a run that
has a config keeps the sizes that it has there."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import CONFIG
from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.data.decode import keep_slot
from mmmoe_pretrain.data.loader import MicrobatchDataset
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.data.sources.listing import is_stream
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.parallel.agreement import from_rank_0
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train.start import config_before

log = logging.getLogger(__name__)
SAMPLES = 512  # at least, or all of the run


def settle(config: RunConfig, modalities: Modalities, host: HostGroups, overwrite: bool) -> RunConfig:
    """``config`` with numbers of experts in place of ``auto``. ``overwrite``: those of an older run do not count.
    Raises ValueError on every rank where they cannot be derived. Collective."""
    if not config.moe.auto_layers:
        return config
    moe = from_rank_0(host.storage, lambda: _settled(config, modalities, overwrite))
    return config.model_copy(update={"moe": moe})


def _settled(config: RunConfig, modalities: Modalities, overwrite: bool) -> MoEConfig:
    """On rank 0."""
    before = None if overwrite else config_before(config.run_dir / CONFIG, lambda: _of_checkpoint(config))
    if before is not None and (kept := as_before(config.moe, before.moe)) is not None:
        return kept
    tokens = count_tokens(config, modalities)
    moe = config.moe.with_budgets(tokens)
    names = tuple(config.modalities)
    for layer in (moe, *map(moe.for_layer, moe.layers)):
        layer.check_modalities(names)
    total = sum(tokens.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in tokens.items())
    sizes = ", ".join(
        f"{' and '.join(group.modalities or ('all',))} {group.num_experts}" for group in moe.expert_groups
    )
    log.info("moe.expert_groups: experts of %s, by the tokens of the training data: %s", sizes, shares)
    return moe


def _of_checkpoint(config: RunConfig) -> dict[str, Any] | None:
    """The config in the newest checkpoint: with ``checkpoint.folder`` the run's own folder may be of another disk."""
    newest = store.find_latest(config.checkpoint_root)
    return None if newest is None else store.read_meta(newest).get("config")


def as_before(moe: MoEConfig, saved: MoEConfig) -> MoEConfig | None:
    """``moe`` with the sizes of ``saved``, where these are of the same groups and all known; else None."""

    def filled(now: MoEConfig, before: MoEConfig) -> list[dict[str, object]] | None:
        pairs = list(zip(now.expert_groups, before.expert_groups, strict=False))
        same = len(now.expert_groups) == len(before.expert_groups) and now.num_experts == before.num_experts
        if not same or any(one.modalities != other.modalities or other.auto for one, other in pairs):
            return None
        sizes = [other.num_experts if one.auto else one.num_experts for one, other in pairs]
        return [
            {**group.model_dump(mode="json"), "num_experts": size}
            for group, size in zip(now.expert_groups, sizes, strict=True)
        ]

    found = {i: filled(*((of if i is None else of.for_layer(i)) for of in (moe, saved))) for i in moe.auto_layers}
    if None in found.values():
        return None
    layers = {i: {**own, "expert_groups": found[i]} if i in found else own for i, own in moe.layers.items()}
    own = {"expert_groups": found[None]} if None in found else {}
    return MoEConfig.model_validate({**moe.model_dump(), "layers": layers, **own})


def count_tokens(config: RunConfig, modalities: Modalities) -> dict[str, float]:
    """The tokens of each modality that the experts see of the first samples of the run. Raises ValueError where that
    is not known before it starts."""
    where = "moe.expert_groups: num_experts auto follows the tokens of data.train"
    if streams := [source.path for source in config.data.train if is_stream(source.path)]:
        raise ValueError(
            f"{where}, and the samples of a stream ({streams[0].split()[0]} ...) are not known before they are read; "
            f"give numbers, which add up to moe.num_experts"
        )
    dataset = MicrobatchDataset(config, modalities)
    each = config.train.global_batch_size // config.train.num_microbatches
    count = min(config.train.steps * config.train.num_microbatches, -(-SAMPLES // each))
    found = np.zeros(len(config.modalities), dtype=np.int64)
    for number in range(count):
        rows = range(min(each, SAMPLES))
        samples = [keep_slot(made.item) for made in dataset.samples(number, rows)]
        batch = pack(samples, dataset.settings, dataset.positions(number)[: len(rows)])
        found += np.bincount(batch.modality_ids[batch.valid].numpy(), minlength=len(found))
    if not found.any():
        raise ValueError(f"{where}, and the first {count * each} samples have none; give numbers")
    return dict(zip(config.modalities, found.astype(float).tolist(), strict=True))
