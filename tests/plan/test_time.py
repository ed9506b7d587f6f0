"""The time of a step in closed form: each part by hand on a machine of round rates, and what must grow with what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.parallel.counting import ALL_REDUCE
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage, whole
from mmmoe_pretrain.plan.calibrate import fit, with_factors
from mmmoe_pretrain.plan.communication import Microbatch, Parameter
from mmmoe_pretrain.plan.machines import GPUS, PARTS, Collective, Host, Link, Machine
from mmmoe_pretrain.plan.time import StepTime, budget, expected_microbatch, step_time
from tests.support import objectives, tiny_config

# Products and attention at 1000 FLOP/s, memory at 100 bytes/s, an optimizer of 10 bytes a parameter, no latency.
ROUND = Machine(
    name="round", source="by hand", memory=1, peak={"fp32": 2000}, power=500, products={"fp32": ((1, 1000),)},
    attention={"fp32": ((1, 1000),)}, streaming=100, optimizer_bytes=10, ranks_per_node=8,
    host=Host(dense_block=0, moe_block=0, microbatch=0, step_block=0, step=0),
    node=Link(bandwidth=10, latency=0), network=Link(bandwidth=1, latency=0),
)  # fmt: skip
BATCH = Microbatch(tokens=10, samples=2, discrete_tokens=4, targets=2, routed=())
TEXTS = {"reading": {"kind": "next_token"}}  # no stem, no joint head
DENSE = {"num_experts": 1, "experts_per_token": 1}


@dataclass(frozen=True)
class Rank:
    stages: tuple[Stage, ...]
    parameters: tuple[tuple[Parameter, ...], ...]


@dataclass(frozen=True)
class Made:
    config: RunConfig
    layout: Layout
    ranks: tuple[Rank, ...]


def made(stages: list[list[Stage]] | None = None, ranks: int = 1, **sections: Any) -> Made:
    """Two blocks of width 16, whose 100 parameters a stage are matrices in fp32; ``stages`` by pipeline rank."""
    values = {"moe": DENSE, "objectives": TEXTS, **sections}
    values["train"] = {"global_batch_size": 8, "num_microbatches": 4, **sections.get("train", {})}
    config = tiny_config(Path("unused"), **values)
    held = Parameter(100, 4, expert=False)
    parts = [Rank(tuple(own), tuple((held,) for _ in own)) for own in stages or [[whole(2)]]]
    return Made(config, resolve_layout(config, ranks), tuple(parts))


def timed(built: Made, machine: Machine = ROUND, imbalance: float = 1.0) -> StepTime:
    return step_time(built, machine, BATCH, imbalance)


def test_a_dense_model_on_one_rank_by_hand() -> None:
    """Forward and twice that backward, 4 microbatches of 10 tokens."""
    built = made()
    found = timed(built).parts
    costs = model_costs(built.config)
    assert found["products"] == pytest.approx(4 * 3 * 10 * sum(b.projections + b.dense for b in costs.blocks) / 1000)
    assert found["attention"] == pytest.approx(4 * 3 * 10 * sum(b.scores for b in costs.blocks) / 1000)
    assert found["heads"] == pytest.approx(4 * 3 * 10 * costs.last_extra / 1000)
    widths = [built.config.model.ffn_hidden_size, built.config.moe.expert_hidden_size]
    numbers = sum(10 * 16 + 2 * 3 * 16 + 3 * width for width in widths)  # rows; queries, keys, values; activations
    assert found["memory bound"] == pytest.approx(4 * 3 * 10 * 4 * numbers / 100)
    assert found["gradient accumulation"] == pytest.approx(4 * 100 * 12 / 100)  # 4 read, 4 read and 4 written
    assert found["optimizer"] == pytest.approx(100 * 10 / 100)


def test_parts_add_up_and_rates_follow() -> None:
    step = timed(made())
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.tokens_per_second == pytest.approx(4 * 10 / step.seconds)
    flops = model_costs(made().config).training * 40
    assert step.flops == pytest.approx(flops)
    assert step.mfu == pytest.approx(flops / step.seconds / 2000)


def test_experts_take_longer_where_routing_is_uneven_and_gain_from_tensor_ranks() -> None:
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8, "every": 1}
    even, uneven = timed(made(moe=moe)), timed(made(moe=moe), imbalance=1.5)
    assert even.parts["experts"] == pytest.approx(4 * 3 * 10 * 2 * (2 * 6 * 16 * 8) / 1000)
    assert uneven.parts["experts"] == pytest.approx(1.5 * even.parts["experts"])
    cut = timed(made(moe=moe, ranks=2, parallel={"tensor_parallel_size": 2}))
    assert cut.parts["experts"] == pytest.approx(even.parts["experts"] / 2)
    assert cut.parts["tensor parallel"] > 0 and "tensor parallel" not in even.parts


def test_recomputed_blocks_but_the_last_run_forward_once_more() -> None:
    """The first of two, whose numbers are those of ``test_a_dense_model_on_one_rank_by_hand``."""
    built = made(train={"recompute": "blocks"})
    step, block = timed(built), model_costs(built.config).blocks[0]
    numbers = 10 * 16 + 2 * 3 * 16 + 3 * built.config.model.ffn_hidden_size
    forward = (block.projections + block.dense + block.scores) / 1000 + 4 * numbers / 100
    assert step.parts["recomputation"] == pytest.approx(4 * 10 * forward)
    assert step.flops == timed(made()).flops  # of no use, and not counted
    assert "recomputation" not in timed(made()).parts


@pytest.mark.parametrize(("asynchronous", "products"), [(True, 2), (False, 3)])
def test_a_gpu_computes_only_the_first_product_of_experts_again(asynchronous: bool, products: int) -> None:
    """Gate and up, of three products; three of each block run forward and six backward."""
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8, "every": 1}
    machine = ROUND.model_copy(update={"asynchronous": asynchronous})
    plain, again = (timed(made(moe=moe, train={"recompute": mode}), machine) for mode in ("none", "blocks"))
    others = sum(plain.parts[name] for name in ("products", "attention", "memory bound")) / 3 / 2  # forward, a block
    experts = plain.parts["experts"] / 2 * products / 9
    assert again.parts["recomputation"] == pytest.approx(others + experts)


def cut(stages: int) -> list[Stage]:
    """One block each."""
    return [Stage(i, i + 1, first=i == 0, last=i == stages - 1) for i in range(stages)]


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_bubble_is_that_of_the_schedule(virtual: int) -> None:
    """While one rank fills and drains the pipeline: a microbatch of the other, or of its two stages half of it."""
    model = {**tiny_config(Path("unused")).model.model_dump(), "num_layers": 2 * virtual}
    parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_size": virtual}
    stages = cut(2 * virtual)
    both = made([stages[0::2], stages[1::2]], ranks=2, parallel=parallel, model=model)
    alone = [timed(replace(both, ranks=(rank,))) for rank in both.ranks]
    each = [(one.seconds - one.parts["optimizer"]) / 4 for one in alone]
    step = timed(both)
    assert step.parts["pipeline bubble"] == pytest.approx(min(each) / virtual, rel=0.02)  # reports are once a step
    assert step.seconds == pytest.approx(4 * max(each) + min(each) / virtual + 100 * virtual * 10 / 100, rel=0.02)


def test_a_slower_network_never_makes_a_step_faster() -> None:
    built = made(ranks=16, train={"global_batch_size": 128})
    seconds = [
        timed(built, ROUND.model_copy(update={"network": Link(bandwidth=rate, latency=latency)})).seconds
        for rate, latency in ((100, 0), (10, 0), (1, 0), (1, 5))
    ]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    near = timed(built, ROUND.model_copy(update={"ranks_per_node": 16}))
    assert near.seconds < seconds[2]
    assert sum(one.across for one in near.traffic) == 0


def test_gradients_hide_behind_the_backward_pass_where_they_may() -> None:
    """2 x 1/2 of 400 bytes at 10 bytes/s, and all of them fit beside the last backward pass."""
    seen, hidden = (
        timed(made(ranks=2, parallel={"overlap_grad_reduce": flag, "expert_parallel_size": 1}))
        for flag in (False, True)
    )
    assert seen.parts["gradients"] == pytest.approx(40)
    assert "gradients" not in hidden.parts and hidden.seconds == pytest.approx(seen.seconds - 40)


def test_zero_1_divides_the_optimizer_of_experts_among_their_replicas() -> None:
    """100 dense parameters and 60 of experts, on 4 ranks of which 2 hold all experts."""
    held = Parameter(100, 4, expert=False), Parameter(60, 4, expert=True)
    parallel = {"expert_parallel_size": 2, "zero_stage": 1}
    built = made(ranks=4, parallel=parallel, moe={"num_experts": 4, "experts_per_token": 2})
    shared = timed(replace(built, ranks=(Rank((whole(2),), (held,)),)))
    assert shared.parts["optimizer"] == pytest.approx((100 / 4 + 60 / 2) * 10 / 100)
    assert shared.parts["parameters"] > 0


def test_the_host_is_seen_where_it_is_slower_than_the_device_or_waits_for_it() -> None:
    host = Host(dense_block=10_000, moe_block=0, microbatch=0, step_block=0, step=0)
    device = timed(made()).seconds - 10  # without the optimizer
    behind = timed(made(), ROUND.model_copy(update={"host": host}))
    assert behind.parts["host"] == pytest.approx(4 * 2 * 10_000 - device)
    sparse = Host(dense_block=0, moe_block=20, dispatch=10, microbatch=0, step_block=0, step=0)
    moe, machine = {"num_experts": 4, "experts_per_token": 2, "every": 1}, ROUND.model_copy(update={"host": sparse})
    stalled = timed(made(moe=moe, ranks=2, parallel={"expert_parallel_size": 2}), machine)
    assert stalled.parts["host"] == pytest.approx(4 * 2 * 30 / 3)  # forward, after the sizes of the exchange
    assert "host" not in timed(made(moe=moe), machine).parts  # experts are local
    waits = timed(made(), ROUND.model_copy(update={"host": host, "asynchronous": False}))
    assert waits.parts["host"] == pytest.approx(4 * 2 * 10_000)
    again = timed(made(train={"recompute": "blocks"}), ROUND.model_copy(update={"host": host, "asynchronous": False}))
    assert again.parts["host"] == pytest.approx((4 / 3 + 1) / 2 * waits.parts["host"])  # not the last block


def test_a_measured_factor_of_the_device_does_not_lengthen_what_the_host_takes() -> None:
    """A step that waits for its host takes as long beside a device of half the speed."""
    host = Host(dense_block=10_000, moe_block=0, microbatch=0, step_block=0, step=0)
    machine, ones = ROUND.model_copy(update={"host": host}), dict.fromkeys(PARTS, 1.0)
    behind, slower = (timed(made(), with_factors(machine, {**ones, "computation": factor})) for factor in (1.0, 2.0))
    assert slower.parts["products"] == pytest.approx(2 * behind.parts["products"])
    assert slower.seconds == pytest.approx(behind.seconds) == pytest.approx(4 * 2 * 10_000 + 10)


def test_hooks_of_zero_3_take_longer_where_the_host_does() -> None:
    """Of each block twice the host's time of a dense one, of the rest 0.75 of its time."""
    host = Host(dense_block=10, moe_block=30, microbatch=8, step_block=0, step=0)
    machine = ROUND.model_copy(update={"host": host, "asynchronous": False})
    built = made(parallel={"engine": "deepspeed", "zero_stage": 3})
    blocks, number = built.config.model.num_layers, built.config.train.num_microbatches
    ones = dict.fromkeys(PARTS, 1.0)
    plain, slower = (timed(built, with_factors(machine, {**ones, "host": factor})).parts for factor in (1.0, 2.0))
    assert plain["ZeRO-3 hooks"] == pytest.approx(number * (2 * 10 * blocks + 0.75 * 8))
    assert slower["ZeRO-3 hooks"] == pytest.approx(2 * plain["ZeRO-3 hooks"])


def test_ranks_that_share_cores_take_turns() -> None:
    """4 ranks on 2 cores: the work of two; on 4 cores nothing changes but what busy cores cost one another."""
    built = made(ranks=4, parallel={"expert_parallel_size": 1})
    alone = timed(built)
    two, four = (timed(built, ROUND.model_copy(update={"cores": cores})) for cores in (2, 4))
    assert two.seconds == pytest.approx(2 * alone.seconds)
    assert four.seconds == pytest.approx(alone.seconds)
    assert two.work == pytest.approx(4 * alone.seconds)


def test_ranks_beside_one_another_are_slower_by_what_was_measured_of_each_part() -> None:
    """On two cores: two ranks as measured, three half-way between two and four; one rank alone is not slower."""
    slower = {"memory bound": ((2, 1.5), (4, 2.0)), "optimizer": ((2, 1.25),)}
    crowded = ROUND.model_copy(update={"cores": 2, "crowded": slower})

    def times(ranks: int) -> dict[str, float]:
        built = made(ranks=ranks, parallel={"expert_parallel_size": 1})
        alone, beside = (timed(built, machine).parts for machine in (ROUND, crowded))
        return {part: beside[part] / alone[part] for part in ("products", "memory bound", "optimizer")}

    assert times(2) == pytest.approx({"products": 1, "memory bound": 1.5, "optimizer": 1.25})
    assert times(4) == pytest.approx({"products": 1, "memory bound": 2, "optimizer": 1.25})
    assert crowded.slowed("memory bound", 3) == 1.75
    assert crowded.model_copy(update={"ranks_per_node": 2}).slowed("memory bound", 4) == 1.5  # two nodes
    assert timed(made(), crowded).seconds == pytest.approx(timed(made()).seconds)


def test_calls_of_ranks_that_share_cores_take_the_cpu_time_that_was_measured_so() -> None:
    """Which the factor of communication, of calls that wait, does not change."""
    built = made(ranks=4, parallel={"expert_parallel_size": 1})
    calls = tuple(
        Collective(kind=ALL_REDUCE, ranks=4, shared=shared, seconds=((1e9, seconds),))
        for shared, seconds in ((False, 10.0), (True, 2.0))
    )
    machine = ROUND.model_copy(update={"collectives": calls, "asynchronous": False, "factors": {"gradients": 3.0}})
    alone, shared = (timed(built, machine.model_copy(update={"cores": cores})).parts for cores in (4, 2))
    assert alone["gradients"] == pytest.approx(3 * 10 / 2 * shared["gradients"]) and shared["gradients"] % 2 == 0


def test_others_compute_while_the_fullest_expert_rank_keeps_one_core_waiting() -> None:
    """Two ranks, of which one gets 1.5 times its share: on two cores both take as long as the fullest. The work of
    both, and so the time on one core, is that of even shares."""
    moe = {"num_experts": 4, "experts_per_token": 2, "every": 1}
    built = made(ranks=2, moe=moe, parallel={"expert_parallel_size": 2})
    two, one = (ROUND.model_copy(update={"cores": cores}) for cores in (2, 1))
    even, uneven = (step_time(built, two, imbalance=imbalance) for imbalance in (1.0, 1.5))
    assert uneven.parts["experts"] == pytest.approx(1.5 * even.parts["experts"])
    assert uneven.seconds > even.seconds
    assert uneven.work == pytest.approx(even.work)
    assert step_time(built, one, imbalance=1.5).seconds == pytest.approx(2 * even.seconds)


def test_a_budget_by_hand() -> None:
    """1,000 tokens/s on 4 GPUs of 500 W: a day for 86.4 million tokens."""
    step = StepTime(2.0, {}, 2000.0, 1.0, 1.0, ranks=4, power=2000.0, traffic=(), work=8.0)
    found = budget(step, 86.4e6)
    assert (found.days, found.gpu_hours, found.kwh) == pytest.approx((1, 96, 48))


def test_the_expected_microbatch_has_the_tokens_of_full_samples() -> None:
    """16 samples in 4 microbatches over 2 ranks: 2 each. Image 4, audio 6, text 18 tokens; 1 pair of texts' ids."""
    config = tiny_config(
        Path("unused"), objectives=objectives({}, None), train={"global_batch_size": 16, "num_microbatches": 4}
    )
    batch = expected_microbatch(config, resolve_layout(config, 2))
    assert (batch.tokens, batch.samples, batch.discrete_tokens, batch.targets) == (2 * 28, 2, 2 * 18, 0)
    assert expected_microbatch(config, resolve_layout(config, 2), tokens_a_sample=14).tokens == 28


def test_factors_are_found_from_the_steps_of_three_layouts() -> None:
    """Steps of a machine that computes at half the rate and sends at a third of it."""
    measured = Collective(kind=ALL_REDUCE, ranks=2, seconds=((1, 1 / 5),))
    machine = ROUND.model_copy(update={"collectives": (measured,), "asynchronous": False})
    true = with_factors(machine, {"computation": 2.0, "memory": 1.0, "host": 1.0, "communication": 3.0})
    layouts = [made(ranks=ranks, parallel={"expert_parallel_size": 1}) for ranks in (1, 2, 4)]
    plans = [lambda m, one=one: timed(one, m).seconds for one in layouts]
    found = fit(machine, plans, [plan(true) for plan in plans], prior=1e-3)  # type: ignore[arg-type]
    other = made(ranks=8, parallel={"expert_parallel_size": 1}, train={"global_batch_size": 64})
    assert timed(other, found).seconds == pytest.approx(timed(other, true).seconds, rel=0.02)
    assert found.factors["gradients"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_complete(name: str) -> None:
    machine = GPUS[name]
    assert machine.source
    for precision, peak in machine.peak.items():
        assert all(0 < rate <= peak for _, rate in machine.products[precision])
        assert all(0 < rate <= peak for _, rate in machine.attention[precision])


def test_the_pass_of_a_teacher_takes_the_time_of_a_forward_pass() -> None:
    pairs = {"pairs": {"image-text": 1.0}}
    alone = timed(made(objectives={"pairs": {"kind": "contrastive", **pairs}}))
    average = {"optimizer": {"average": 0.9}}
    taught = timed(made(objectives={"pairs": {"kind": "self_distillation", **pairs}}, **average))
    # a backward pass takes the time of two
    assert taught.parts["attention"] == pytest.approx(4 / 3 * alone.parts["attention"])
