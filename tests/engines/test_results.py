"""What a step adds up of its microbatches and ranks, and what an objective that is off adds to it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import add_reports, not_finite
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import objectives, random_batch, tiny_config


def test_reports_add_up_as_they_come(tmp_path: Path) -> None:
    """Three microbatches, whose sums are one report: nothing of the microbatches themselves is kept."""
    config = tiny_config(tmp_path)
    model = PretrainingModel(config)
    reports = [model(random_batch(config, ["iat", "it", "a"], seed=seed))[1] for seed in range(3)]
    for number, report in enumerate(reports):  # as if experts had been lent
        lent = torch.full((4,), 1.0 + number)
        reports[number] = LossReport(
            report.losses, tuple(dataclasses.replace(r, lending=lent) for r in report.routing)
        )
    sums: LossReport | None = None
    for report in reports:
        sums = add_reports(sums, report)
    assert sums is not None
    assert list(sums.losses) == list(reports[0].losses)
    for name, loss in sums.losses.items():
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(sum(report.losses[name].item() for report in reports), rel=1e-12)
    for i, layer in enumerate(sums.routing):
        for field in dataclasses.fields(RoutingStats):
            if field.name in ("orthogonality", "names", "layer", "allowed_ME"):  # of the router, not of its tokens
                continue
            parts = [getattr(report.routing[i], field.name) for report in reports]
            torch.testing.assert_close(getattr(layer, field.name), torch.stack(parts).sum(0), msg=field.name)


def losses_without_contrastive() -> list[dict[str, float]]:
    found = []
    with process_group(timeout_minutes=0.5) as device:
        for contrastive in (
            {"weight": 0},
            {"weight": 0, "cached": True},
            {"pairs": {"image-text": 0}, "cached": True},
        ):
            config = tiny_config(Path(), objectives=objectives(contrastive))
            engine = build_engine(config, groups_of(config.parallel, 4), device)
            found.append(engine.step([random_batch(config, ["iat", "it"], seed) for seed in range(2)], 1e-2).losses)
            destroy_groups()
    return found


def test_a_cached_objective_that_is_off_changes_nothing() -> None:
    plain, *cached = run_ranks(1, losses_without_contrastive)[0]
    assert plain["captioning"] > 0 and cached == [plain, plain]


def one_rank_finds_no_number() -> list[list[list[float]]]:
    found = []
    with process_group(timeout_minutes=0.5) as device:
        for degrees in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"expert_parallel_size": 2}):
            groups = groups_of(ParallelConfig.model_validate(degrees), 4)
            rank = groups.data_rank + groups.tensor_rank + groups.pipeline_rank
            numbers = (2.0, float("nan") if rank == 1 else 2.0, float("inf") if rank == 0 else 2.0)
            bad = [not_finite(torch.tensor([1.0, number], device=device), groups).tolist() for number in numbers]
            found.append(bad)
            destroy_groups()
    return found


def test_what_one_rank_finds_all_know() -> None:
    assert run_ranks(2, one_rank_finds_no_number) == [[[[0.0], [1.0], [1.0]]] * 4] * 2
