"""The log of a run: JSON lines, truncation on resume, the figure and TensorBoard's events."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives import StepCounts
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train import metrics
from mmmoe_pretrain.train.metrics import (
    LayerRouting,
    MetricsLog,
    Recorder,
    SampleCounts,
    StepRecord,
    to_json,
    truncate_after,
)
from mmmoe_pretrain.train.planned import Planned
from mmmoe_pretrain.train.scalars import scalars
from mmmoe_pretrain.train.telemetry import gather_routing, layer_json
from tests.distributed import run_ranks

NAMES = StreamNames(("image", "audio", "text"), ("contrastive", "captioning"))


def layer_routing(layer: int = 1, experts: int = 4) -> LayerRouting:
    """300 image tokens (200 of them in captions) and 100 text tokens, two experts each; audio has none.

    Image: experts 0 and 1 in the contrastive task, 0 and 2 in captions. Text: 1 and 2, all contrastive.
    The router gives each token's two experts 3/4 and 1/4, so that a token's entropy is that of a coin
    thrown 3 to 1; a hundred image assignments of captions find no room.
    """
    coin = np.log(4) - 0.75 * np.log(3)
    counts, probability = np.zeros((3, 2, experts)), np.zeros((3, 2, experts))
    for modality, task, tokens, first, second in ((0, 0, 100, 0, 1), (0, 1, 200, 0, 2), (2, 0, 100, 1, 2)):
        counts[modality, task, [first, second]] = tokens
        probability[modality, task, [first, second]] = 0.75 * tokens, 0.25 * tokens
    together = np.zeros((3, experts, experts))
    for modality, tokens, a, b in ((0, 100, 0, 1), (0, 200, 0, 2), (2, 100, 1, 2)):
        together[modality, a, b] = together[modality, b, a] = tokens
    tokens_MX = np.array([[100.0, 200.0], [0, 0], [100, 0]])
    return LayerRouting(
        layer=layer,
        names=NAMES,
        tokens_MX=tokens_MX,
        counts_MXE=counts,
        probability_MXE=probability,
        entropy_MX=coin * tokens_MX,
        dropped_MX=np.array([[0.0, 100.0], [0, 0], [0, 0]]),
        coactivation_MEE=together,
    )


def record(step: int, total: float = 3.0, routing: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        losses={"total": total, "contrastive/image-text": total - 0.5, "aux/global_entropy/image": 0.5},
        learning_rate=1e-3,
        grad_norm=0.8,
        tokens=4000,
        seconds=2.0,
        data_seconds=0.5,
        loading_seconds={"decode": 3.0},
        samples=SampleCounts(bad=1, tokens=90_000),
        routing=(layer_routing(),) if routing else (),
        memory={"resident": 3 * 2.0**29},
        flops_a_token=2e9,
        peak_flops=3.2e13,
    )


def read_log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_events(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_a_record_becomes_one_json_line_with_modalities_by_name(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.write(record(10))
        (line,) = read_log(tmp_path)  # flushed before the log is closed
    assert line["step"] == 10
    assert line["losses"] == {"total": 3.0, "contrastive/image-text": 2.5, "aux/global_entropy/image": 0.5}
    assert (line["tokens"], line["seconds"], line["data_seconds"], line["bad_samples"]) == (4000, 2.0, 0.5, 1)
    assert line["loading_seconds"] == {"decode": 3.0}
    assert (line["tokens_total"], line["tokens_per_second"], line["data_stall"]) == (90_000, 2000.0, 0.25)
    assert (line["flops_per_second"], line["mfu"], line["peak_memory"]) == (4e12, 0.125, {"resident": 3 * 2**29})
    (layer,) = line["routing"]
    assert (layer["layer"], layer["tokens"]) == (1, {"image": 300.0, "audio": 0.0, "text": 100.0})
    # Assignments by expert: 300, 100 + 100, 200 + 100, 0 of 800, and an even share is 200.
    assert layer["load_over_even"] == [1.5, 1.0, 1.5, 0.0]
    assert layer["assignments"] == {"image": 600.0, "audio": 0.0, "text": 200.0}
    with closing(MetricsLog(tmp_path)) as log:
        log.write(record(1, total=float("nan")))
    assert read_log(tmp_path)[0]["losses"]["total"] is None


def test_rates_of_a_modality_are_over_its_tokens_of_all_tasks() -> None:
    layer = layer_json(layer_routing())
    # Image: 300 tokens, of whose 600 assignments 300 go to expert 0, 100 to 1 and 200 to 2.
    assert layer["load"] == {"image": [0.5, 0.1667, 0.3333, 0.0], "audio": [0.0] * 4, "text": [0, 0.5, 0.5, 0]}
    # 0: 3/4 of every token; 1: 1/4 of a third of them; 2: 1/4 of two thirds.
    assert layer["mean_probability"]["image"] == [0.75, 0.08333, 0.1667, 0.0]
    assert layer["mean_probability"]["text"] == [0.0, 0.75, 0.25, 0.0]
    coin = 0.562335  # -3/4 ln 3/4 - 1/4 ln 1/4
    assert layer["entropy"] == {"image": coin, "audio": 0.0, "text": coin}
    # -3/4 ln 3/4 - 1/12 ln 1/12 - 1/6 ln 1/6
    assert layer["marginal_entropy"] == {"image": pytest.approx(0.721463, abs=2e-6), "audio": 0.0, "text": coin}
    assert layer["dropped"] == {"image": 0.166667, "audio": 0.0, "text": 0.0}


def test_tasks_are_distinguished_where_they_have_tokens() -> None:
    tasks = layer_json(layer_routing())["tasks"]
    assert {task: set(cells) for task, cells in tasks.items()} == {
        "contrastive": {"image", "text"},
        "captioning": {"image"},
    }
    assert tasks["captioning"]["image"] == {
        "tokens": 200.0,
        "load": [0.5, 0.0, 0.5, 0.0],
        "mean_probability": [0.75, 0.0, 0.25, 0.0],
        "entropy": 0.562335,
        "dropped": 0.25,
    }
    assert tasks["contrastive"]["image"]["load"] == [0.5, 0.5, 0.0, 0.0]


def test_coactivation_is_logged_as_its_strongest_pairs_at_most_eight() -> None:
    pairs = layer_json(layer_routing())["coactivation"]
    assert pairs == {"image": [[0, 2, 0.6667], [0, 1, 0.3333]], "text": [[1, 2, 1.0]]}
    layer = layer_routing(experts=6)
    layer.coactivation_MEE[0] = 1.0  # fifteen pairs, and a diagonal that is not a pair
    many = layer_json(layer)["coactivation"]["image"]
    assert len(many) == 8 and all(a < b for a, b, _ in many)


def test_layers_may_have_unlike_numbers_of_experts(tmp_path: Path) -> None:
    both = dataclasses.replace(record(1), routing=(layer_routing(1, experts=4), layer_routing(3, experts=6)))
    with closing(MetricsLog(tmp_path, heatmap_every=1)) as log:
        log.write(both)
    assert [len(layer["load"]["image"]) for layer in read_log(tmp_path)[0]["routing"]] == [4, 6]
    assert dict(scalars(to_json(both)))["2_routing/dead_experts"] == 1 + 3


def test_combinations_are_logged_with_the_share_of_tokens_that_choose_their_expert() -> None:
    assert "combinations" not in layer_json(layer_routing())
    names = dataclasses.replace(NAMES, combinations=(("image",), ("audio",), ("image", "audio")))
    sums = np.array([[2.5, 8.0, 6.0], [0.0, 0.0, 0.0], [9.0, 3.0, 1.0]])
    layer = dataclasses.replace(layer_routing(3), names=names, combination_C3=sums)
    expected = {
        "image": {"tokens": 8.0, "to_its_expert": 0.75},
        "image-audio": {"tokens": 3.0, "to_its_expert": 0.3333},
    }
    assert layer_json(layer)["combinations"] == expected
    values = dict(scalars(to_json(dataclasses.replace(record(1), routing=(layer,)))))
    assert values["6_layers/03/to_its_expert/image-audio"] == 0.3333


def test_lending_is_logged_as_rows_of_the_fullest_rank_over_the_mean() -> None:
    lent = dataclasses.replace(layer_routing(3), lending=np.array([300.0, 130.0, 100.0, 5.0]))
    assert "lending" not in layer_json(layer_routing())
    assert layer_json(lent)["lending"] == {"max_over_mean": 3.0, "with_lending": 1.3, "experts": 5.0}
    values = dict(scalars(to_json(dataclasses.replace(record(1), routing=(layer_routing(1), lent)))))
    assert values["6_layers/03/lending/with_lending"] == 1.3 and "6_layers/01/lending/experts" not in values


def test_sums_of_a_step_become_numbers_and_what_ranks_keep_is_summed_over_them() -> None:
    """Two layers of 2 and 3 experts. What ``reduce_stats`` has summed already is the same on both
    ranks and must not be added again; the pairs of rank r count r + 1 times, 1 + 2 in all."""

    def gather() -> list[tuple[int, list[float], float, float]]:
        with process_group(timeout_minutes=1):
            layers = gather_routing((sums(0, 2), sums(1, 3)), dist.group.WORLD)
        assert layers[0].lending is None and layers[1].lending.tolist() == [6.0, 3.0, 3.0, 1.0]
        return [(r.layer, r.tokens_M.tolist(), r.counts_MXE.sum(), r.coactivation_MEE[0, 0, 1]) for r in layers]

    def sums(layer: int, experts: int) -> RoutingStats:
        pairs = torch.zeros(3, experts, experts)
        pairs[0, 0, 1] = pairs[0, 1, 0] = (dist.get_rank() + 1) * 10.0**layer
        return dataclasses.replace(
            zero_stats(experts), layer=layer, tokens_MX=torch.full((3, 2), 2.0 + layer),
            counts_MXE=torch.ones(3, 2, experts, requires_grad=True), coactivation_MEE=pairs,
            lending=torch.tensor([3.0, 1.5, 1.5, 0.5]) if layer else None)  # fmt: skip

    expected = [(0, [4.0, 4.0, 4.0], 12.0, 3.0), (1, [6.0, 6.0, 6.0], 18.0, 30.0)]
    assert run_ranks(2, gather) == [expected, expected]


def zero_stats(experts: int) -> RoutingStats:
    of_expert, of_cell, pairs = torch.zeros(3, 2, experts), torch.zeros(3, 2), torch.zeros(3, experts, experts)
    return RoutingStats(
        probability_MXE=of_expert, entropy_MX=of_cell, z_MX=of_cell, counts_MXE=of_expert, tokens_MX=of_cell,
        dropped_MX=of_cell, load_ME=torch.zeros(3, experts), sequence_balance=torch.zeros(2), coactivation_MEE=pairs,
        combination_C3=torch.zeros(0, 3),
        orthogonality=torch.zeros(()), names=NAMES, allowed_ME=torch.ones(3, experts).bool(),
    )  # fmt: skip


def test_resume_drops_the_steps_past_the_checkpoint(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        for step in (10, 20, 30, 40):
            log.write(record(step, total=1.0))
    with closing(MetricsLog(tmp_path, resume_step=20)) as log:
        log.write(record(30, total=2.0))
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert [line["losses"]["total"] for line in lines] == [1.0, 1.0, 2.0]
    totals = [(event.step, event.value) for event in read_events(tmp_path).Scalars("1_loss/total")]
    assert totals == [(10, 1.0), (20, 1.0), (30, 2.0)]


LINES = '{"step": 1}\n{"step": 20}\n'


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (LINES + '{"step": 21}\n{"step": 30}\n', LINES),
        (LINES + '{"ste', LINES),
        (LINES + '{"step": 21}\n{"ste', LINES),
        ("nobody reads this\n" + LINES, "nobody reads this\n" + LINES),
        ('{"step": 21}\n{"step": 22}\n', ""),
        ('{"ste', ""),
        ("", ""),
    ],
)
def test_a_log_is_cut_behind_a_step_and_in_a_torn_line(tmp_path: Path, text: str, left: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    truncate_after(path, 20)
    assert path.read_text() == left


def test_a_foreign_line_behind_the_last_step_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 9}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: the line at byte 12 is not a record"):
        truncate_after(path, 5)
    assert path.read_text().count("\n") == 3


def test_tensorboard_gets_derived_values_under_ordered_groups() -> None:
    # Assignments by expert: 300, 100 + 100, 200 + 100, 0 of 800, and an even share is 200.
    np.testing.assert_allclose(layer_routing().load_over_even_E, [1.5, 1.0, 1.5, 0.0])
    values = dict(scalars(to_json(record(10))))
    assert values["1_loss/total"] == 3.0
    assert values["1_loss/contrastive/image-text"] == 2.5
    assert values["4_auxiliary_loss/global_entropy/image"] == 0.5
    assert values["2_routing/load_over_even_max"] == 1.5
    assert values["2_routing/dead_experts"] == 1
    assert values["2_routing/dropped/image"] == pytest.approx(1 / 6, rel=1e-5)
    assert values["6_layers/01/entropy/text"] == pytest.approx(0.562335)
    assert values["5_speed/tokens_per_second"] == 2000
    assert values["5_speed/data_wait_fraction"] == 0.25
    assert values["5_speed/tflops_per_second"] == 4.0 and values["5_speed/mfu"] == 0.125
    assert values["5_speed/peak_memory_gib/resident"] == 1.5
    assert values["6_layers/01/dead_experts"] == 1


def test_a_record_has_its_speed_over_the_planned_one() -> None:
    planned = Planned(tokens_per_second=8000.0, peak_memory=1e9, lines=())
    found = to_json(dataclasses.replace(record(10), planned=planned))  # 2,000 tokens/s
    assert found["planned"] == {"tokens_per_second": 8000, "peak_memory": 10**9, "speed_over_plan": 0.25}


def test_a_record_tells_what_balances_objectives_and_modalities() -> None:
    named = {"weight/pairs/image-text": 0.51234567, "ratio/scene/image": float("nan")}
    values = to_json(dataclasses.replace(record(10), balance=named))
    assert values["balance"] == {"weight/pairs/image-text": 0.512346, "ratio/scene/image": None}
    assert dict(scalars(values))["1_balance/weight/pairs/image-text"] == 0.512346
    assert "balance" not in to_json(record(10))


def test_a_record_has_what_all_ranks_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 holds most memory and has the last stage; rank 0 waits longest."""

    def of_rank() -> StepRecord:
        with process_group(timeout_minutes=1):
            rank = dist.get_rank()
            monkeypatch.setattr(metrics, "peak_memory", lambda device: {"allocated": 5.0 + rank, "reserved": 9.0})
            recorder = Recorder(ranks=dist.group.WORLD, pipeline=dist.group.WORLD)
            balance = {"score/scene/image": torch.tensor([0.5])} if rank else {}
            result = StepResult({"total": 1.0}, 1.0, StepCounts(100, {}), (), balance=balance)
            recorder.add(result, LoadStats(4, wait_seconds=2.0 - rank))
            return recorder.record(1, result, 0.1, SampleCounts())

    for found in run_ranks(2, of_rank):
        assert (found.memory, found.data_seconds) == ({"allocated": 6.0, "reserved": 9.0}, 2.0)
        assert found.balance == {"score/scene/image": 0.5}


def test_the_growth_of_a_process_is_told_where_its_steps_are_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 units before the model; a checkpoint's loading took up to 7; the steps take 6, then 9."""

    def memory_at(largest: float) -> dict[str, float]:
        monkeypatch.setattr(metrics, "peak_memory", lambda device: {"resident": largest})
        result = StepResult({"total": 1.0}, 1.0, StepCounts(100, {}), ())
        recorder.add(result, LoadStats(4))
        return recorder.record(1, result, 0.1, SampleCounts()).memory

    recorder = Recorder(before_model=3.0)
    monkeypatch.setattr(metrics, "largest_resident", lambda: 7.0)
    recorder.begin_steps()
    assert memory_at(7.0) == {"resident": 7.0}
    assert memory_at(9.0) == {"resident": 9.0, "grown": 6.0}


def test_events_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, heatmap_every=20)) as log:
        for step in (10, 20, 30):
            log.write(record(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("3_optimizer/learning_rate")] == [10, 20, 30]
    # One at step 20, and one of the last routing when the log is closed.
    assert [event.step for event in events.Images("routing")] == [20, 30]


def test_the_heatmap_shows_loads_at_the_first_record_past_each_multiple(tmp_path: Path) -> None:
    path = tmp_path / "routing_training.png"
    with closing(MetricsLog(tmp_path, heatmap_every=25)) as log:
        log.write(record(20))
        assert not path.exists()
        log.write(record(30))
        with Image.open(path) as image:
            assert image.width > 400 and image.height > 150
            colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    # Viridis at its top (the largest share, 50%) and at 0%, and the grey of the absent modality.
    for expected in ((253, 231, 36), (68, 1, 84), (228, 228, 228)):
        assert np.abs(colours - np.array(expected)).max(axis=1).min() <= 1, expected
    assert not list(tmp_path.glob("*.tmp"))


def test_a_dense_model_logs_without_routing(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, heatmap_every=1)) as log:
        log.write(record(1, routing=False))
    assert read_log(tmp_path)[0]["routing"] == []
    assert not (tmp_path / "routing_training.png").exists()
    assert not [tag for tag in read_events(tmp_path).Tags()["scalars"] if "routing" in tag]
