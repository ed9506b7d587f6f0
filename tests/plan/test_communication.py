"""The closed forms of communication, by hand and by enumeration, beyond the layouts whose calls and bytes
tests/benchmarks/test_scaling.py counts exactly."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT, REDUCE_SCATTER
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage, whole
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan.communication import Microbatch, Parameter, Routed, Transfer
from tests.support import objectives, tiny_config

ALONE = replace(resolve_layout(tiny_config(Path("unused")), 1), zero_stage=0)
NOWHERE = Routed(0, 0, 0, 0)


def found(transfers: list[Transfer]) -> dict[tuple[str, str, str], tuple[int, float]]:
    return {(t.what, t.kind, t.group): (t.calls, t.sent) for t in transfers}


def test_recomputed_blocks_send_forward_twice_and_chunks_cut_calls_not_rows() -> None:
    """Rank 0 of 2, with 4 experts: 3 rows of 40 bytes leave for 4 assignments, 5 rows come for 6."""
    made = found(list(plan.dispatch(2, 4, 3, Routed(3, 5, 4, 6), row_bytes=40, forward_passes=2)))
    assert made == {
        ("sizes", ALL_TO_ALL, "expert"): (2, 2 * 3 * (1 + 2) * 4),
        ("assignments", ALL_TO_ALL, "expert"): (3 * 3, 2 * 4 * 8 + 6 * 4),
        ("rows", ALL_TO_ALL, "expert"): (3 * 3 * 2, (8 + 8 + 8) * 40),
    }


@pytest.mark.parametrize(("num_experts", "top_k", "ranks"), [(4, 2, 2), (6, 3, 3), (8, 2, 4), (8, 1, 4)])
def test_even_routing_by_counting_all_sets_of_experts(num_experts: int, top_k: int, ranks: int) -> None:
    local = num_experts // ranks
    sets = list(itertools.combinations(range(num_experts), top_k))
    rows = sum(len({e // local for e in chosen} - {0}) for chosen in sets) / len(sets)
    assignments = sum(sum(e >= local for e in chosen) for chosen in sets) / len(sets)
    made = plan.expected_routed(10, top_k, num_experts, ranks)
    assert made.rows_out == made.rows_in == pytest.approx(10 * rows)
    assert made.assignments_out == made.assignments_in == pytest.approx(10 * assignments)
    most = max(len({e // local for e in chosen} - {0}) for chosen in sets)
    assert plan.most_rows(10, top_k, ranks) == 10 * most
    moe = MoEConfig(num_experts=num_experts, experts_per_token=top_k)
    assert plan.routed_of(moe, 10, ranks) == made
    if top_k > 1:  # attention among experts: a row for every choice
        alone = plan.routed_of(moe.model_copy(update={"expert_attention_size": 4}), 10, ranks)
        assert alone.rows_out == alone.assignments_out == pytest.approx(10 * assignments)


def test_a_pair_of_matrices_sums_once_each_way_and_sequence_parallelism_sends_half_more() -> None:
    # [n, D] of 1,200 bytes over 4 tensor ranks: a ring all-reduce sends 2 x 3/4 of it, twice.
    layout = replace(ALONE, tensor=4)
    assert found(list(plan.matrices(layout, 1200))) == {("matrices", ALL_REDUCE, "tensor"): (2, 2 * 2 * 900)}
    divided = found(list(plan.matrices(replace(layout, sequence_parallel=True), 1200)))
    assert divided == {
        # gathered: the input, its gradient's other half, and the input again for the weight's gradient
        ("matrices", ALL_GATHER, "tensor"): (3, 3 * 900),
        ("matrices", REDUCE_SCATTER, "tensor"): (2, 2 * 900),
    }


def test_dense_gradients_go_over_all_replicas_and_an_experts_over_its_own() -> None:
    parameters = [Parameter(100, 4, expert=False), Parameter(60, 4, expert=True)]
    layout = replace(ALONE, data=4, expert=2, expert_data=2)
    assert found(list(plan.gradients(layout, parameters))) == {
        ("gradients", ALL_REDUCE, "data"): (1, 2 * 3 / 4 * 400),
        ("expert gradients", ALL_REDUCE, "expert_data"): (1, 2 * 1 / 2 * 240),
    }


def planned(config: RunConfig, layout: Layout, stages: list[Stage], batches: list[Microbatch]) -> list[Transfer]:
    parameters = [[Parameter(10, 4, expert=False)] for _ in stages]
    return plan.step_traffic(config, layout, stages, parameters, batches)


def test_messages_between_stages_have_the_rows_of_the_longest_microbatch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, moe={"num_experts": 1, "experts_per_token": 1})
    batches = [Microbatch(tokens, 2, 3, 4, ()) for tokens in (5, 9)]
    layout = replace(ALONE, world_size=2, pipeline=2, virtual_pipeline=2)
    message = 9 * 16 * 4  # hidden size 16, fp32

    def messages(stages: list[Stage], layout: Layout = layout) -> tuple[int, float]:
        return found(planned(config, layout, stages, batches))["hidden states", POINT_TO_POINT, "pipeline"]

    first, inner = Stage(0, 1, first=True, last=False), Stage(1, 2, first=False, last=False)
    last = Stage(1, 2, first=False, last=True)
    assert messages([first]) == messages([last]) == (2, 2 * message)  # states forward; or gradients back
    assert messages([first, inner]) == (6, 6 * message)
    shared = replace(layout, tensor=2, sequence_parallel=True)
    assert messages([first], shared) == (2, 2 * 5 * 16 * 4)  # half of the 9 rows, and one of padding


def test_each_objective_has_its_own_calls(tmp_path: Path) -> None:
    """Of 2 samples with 3 discrete tokens and 4 targets: 3 representations of one objective, 2 of another; two tasks
    share the language head. Embedding size 8, hidden size 16, fp32."""
    other = {"kind": "contrastive", "pairs": {"image-audio": 1.0}}
    both = {**objectives(), "other": other, "reading": {"kind": "next_token"}}
    config = tiny_config(tmp_path, objectives=both, moe={"num_experts": 1, "experts_per_token": 1})
    layout = replace(ALONE, world_size=4, data=2, tensor=2)
    made = [t for t in planned(config, layout, [whole(2)], [Microbatch(5, 2, 3, 4, ())]) if t.what != "matrices"]
    assert [(t.calls, t.sent) for t in made if (t.what, t.kind) == ("features", ALL_GATHER)] == [
        (2, 2 * 3 * 8 * 4 + 2 * 4 * 8), (2, 2 * 2 * 8 * 4 + 2 * 3 * 8)]  # fmt: skip
    calls = found(made)
    assert calls["vocabulary", ALL_REDUCE, "tensor"] == (1, 3 * 16 * 4)
    assert calls["logits", ALL_REDUCE, "tensor"] == (2 * 3, 3 * 4 * 4)
    assert calls["head", ALL_REDUCE, "tensor"] == (2, 4 * 16 * 4)
    assert calls["counts", ALL_REDUCE, "data"] == (1, (1 + 3 + 1 + 1 + 1) * 8)  # tokens, pairs, caption, pair, text


def test_one_process_communicates_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    batch = Microbatch(5, 2, 3, 4, (NOWHERE, NOWHERE))
    assert planned(config, ALONE, [whole(2)], [batch]) == []


def test_the_norm_is_summed_over_the_ranks_that_hold_other_parameters(tmp_path: Path) -> None:
    mixed, dense = tiny_config(tmp_path), tiny_config(tmp_path, moe={"num_experts": 1, "experts_per_token": 1})
    layout = replace(ALONE, world_size=4, data=2, tensor=2, expert=2)
    batch = Microbatch(5, 2, 3, 4, (NOWHERE, NOWHERE))

    def norms(config: RunConfig, layout: Layout) -> dict[str, float]:
        return {t.group: t.sent for t in planned(config, layout, [whole(2)], [batch]) if t.what == "norm"}

    assert norms(mixed, layout) == {plan.MODEL: 2 * 1 / 2 * 4, plan.EXPERT_MODEL: 2 * 3 / 4 * 4}
    assert norms(dense, replace(layout, expert=1)) == {plan.MODEL: 4}
    assert norms(mixed, replace(layout, zero_stage=1)) == {plan.WORLD: 2 * 3 / 4 * 4}
