"""What saves memory or time changes nothing: under several layouts, against one process without it."""

from pathlib import Path

import pytest

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.distributed import run_ranks
from tests.layouts import matrix
from tests.layouts.cases import FIXED_ROUTING, GLOBAL, LAYOUTS, MICROBATCHES, OTHER_BLOCKS, Case
from tests.layouts.train import Outcome, first_moments, start_ranks, torch_optimizer, whole_state
from tests.support import pack_settings, random_sample


def case(layout: str, zero_stage: int = 0, engine: str = "megatron", **more) -> Case:
    ranks, degrees = LAYOUTS[layout]
    parallel = {**degrees, **more.pop("parallel", {})}
    return Case(layout, ranks, engine, zero_stage, parallel, **more)


LEVERS = {
    "experts computed again, EP2": case("EP2", train={"recompute": "experts"}),
    "blocks computed again, EP2": case("EP2", train={"recompute": "blocks"}),
    "blocks computed again, interleaved stages": case("PP2 x VPP2", train={"recompute": "blocks"}),
    "blocks computed again, sequence parallel": case("TP2 + SP", train={"recompute": "blocks"}),
    "gradients reduced during the backward pass": case("EP2", parallel={"overlap_grad_reduce": True}),
    "gradients reduced during the backward pass of stages": case("PP2", parallel={"overlap_grad_reduce": True}),
    "parameters gathered during the forward pass": case(
        "DP2", 1, parallel={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "parameters gathered during the forward pass of stages": case(
        "PP2 x VPP2", 1, parallel={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tokens sent in chunks": case("EP2", chunks=2),
    "ZeRO-2, blocks computed again": case("EP2", 2, "deepspeed", train={"recompute": "blocks"}),
    "ZeRO-3, blocks computed again": case("DP2", 3, "deepspeed", train={"recompute": "blocks"}),
    "ZeRO-2, optimizer on the CPU": case("EP2", 2, "deepspeed", parallel={"offload_optimizer": "cpu"}),
}  # fmt: skip
IN_HALF = {**OTHER_BLOCKS, **FIXED_ROUTING, "router_bias": False}
STEPS = 2
CACHED = ["DP2", "EP2", "PP2", "PP2 x VPP2", "TP2 + SP"]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, matrix.Comparison]:
    found = matrix.run(list(LEVERS.values()), tmp_path_factory.mktemp("levers"), STEPS)
    return dict(zip(LEVERS, found, strict=True))


@pytest.mark.parametrize("name", LEVERS)
def test_the_lever_changes_nothing(comparisons: dict[str, matrix.Comparison], name: str) -> None:
    assert comparisons[name].passed, comparisons[name]


def test_a_cached_contrastive_loss_beside_all_other_losses(tmp_path: Path) -> None:
    """Against one process of the megatron engine, which computes it in the same two passes."""
    layouts = [case(name, cached="beside all") for name in ("DP2", "PP2 x VPP2", "TP2 + SP")]
    layouts.append(case("DP2", 3, "deepspeed", cached="beside all"))
    one_process = Case("one process", 1, "megatron", 0, {}, cached="beside all")
    alone = start_ranks(1, [one_process], tmp_path, STEPS, 90)[0][0]
    assert "captioning" in alone.losses[0] and "aux/balance" in alone.losses[0]
    outcomes = start_ranks(2, layouts, tmp_path, STEPS, 200)
    for i, one in enumerate(layouts):
        comparison = matrix.compare(one, [rank[i] for rank in outcomes], alone)
        assert comparison.passed, comparison


def test_the_settings_of_other_peoples_blocks_over_ranks(tmp_path: Path) -> None:
    """In fp32 and, where biases stay fp32 beside half matrices, in bf16."""
    layouts = [case("EP2", 3, "deepspeed", moe=OTHER_BLOCKS), case("TP2 + SP", moe=OTHER_BLOCKS),
               case("EP2", 1, precision="bf16", moe=IN_HALF)]  # fmt: skip
    settings = {"fp32": OTHER_BLOCKS, "bf16": IN_HALF}
    alone_cases = [Case("one process", 1, "megatron", 0, {}, kind, moe=moe) for kind, moe in settings.items()]
    alone = dict(zip(settings, start_ranks(1, alone_cases, tmp_path, 1, 90)[0], strict=True))
    for name in ("experts.up_bias", "experts.down_bias", "router.logit_bias", "shared.gate.weight"):
        trained = [key for key in alone["fp32"].parameters if key.endswith(f"ffn.{name}")]
        assert trained and all(alone["fp32"].parameters[key][1][0][1].any() for key in trained), name
    outcomes = start_ranks(2, layouts, tmp_path, 1, 200)
    for i, one in enumerate(layouts):
        comparison = matrix.compare(one, [rank[i] for rank in outcomes], alone[one.precision])
        assert comparison.passed, comparison


def one_batch_a_step(config: RunConfig) -> Outcome:
    """One process, one microbatch with all samples of the step, the plain contrastive loss."""
    model = PretrainingModel(config)
    optimizer = torch_optimizer(model, config)
    losses, norms, tokens, moments = [], [], [], {}
    for step in range(STEPS):
        numbers = [100 * (step * MICROBATCHES + a) + i for a in range(MICROBATCHES) for i in range(len(GLOBAL))]
        samples = [random_sample(n, GLOBAL[n % 100], config) for n in numbers]
        batch = pack(samples, pack_settings(config), numbers)
        loss, report = model(batch)
        loss.backward()
        losses.append({"total": float(loss), **{name: float(value) for name, value in report.losses.items()}})
        norms.append(float(_clipped(model, config)))
        optimizer.step()
        moments = moments or first_moments(model, optimizer, "exp_avg")
        optimizer.zero_grad()
        tokens.append(sum(rows.shape[0] for rows in batch.rows.values()))
    return Outcome(losses, norms, tokens, whole_state(model), moments)


def _clipped(model: PretrainingModel, config: RunConfig) -> float:
    from torch.nn.utils import clip_grad_norm_

    return float(clip_grad_norm_(model.parameters(), config.optimizer.clip_norm))


def test_a_cached_contrastive_loss_is_that_of_one_large_batch(tmp_path: Path) -> None:
    cases = [case(layout, cached="alone") for layout in CACHED] + [case("DP2", 3, "deepspeed", cached="alone")]
    config = cases[0].config(tmp_path)
    plain = config.objectives["contrastive"].model_copy(update={"cached": False})
    objectives = {**config.objectives, "contrastive": plain}
    alone = run_ranks(1, one_batch_a_step, config.model_copy(update={"objectives": objectives}))[0]
    outcomes = start_ranks(2, cases, tmp_path, STEPS, 300)
    for i, one in enumerate(cases):
        comparison = matrix.compare(one, [rank[i] for rank in outcomes], alone)
        assert comparison.passed, comparison
