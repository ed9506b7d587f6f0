"""The tables of studies: every variant can be trained, and what is compared costs the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evidence.methods import METHODS, study
from evidence.pictures import PANELS
from evidence.runs import COST, Task, record_of
from evidence.studies import STUDIES
from evidence.study import ROOT, TRAINER, Metric, Start, Study, Variant
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.train.journal import EVENTS

# By corpus, as evidence/data.sh makes them.
VOCABULARY = {
    "emoji": 2048,
    "europe": 2048,
    "gcide": 512,
    "demo": 1024,
    "unseen": 2048,
    "domains": 2048,
    "stamps": 1024,
    "lifelong": 2048,
}
EVERY = (*STUDIES, *METHODS)
TRAINED = [(each, variant) for each in EVERY for variant in each.variants if not variant.same_as]
EQUAL = 0.03  # of active FLOPs: what the router of 16 experts adds
ROUTERS_OF_64 = 0.08  # as the page's column of FLOPs shows
OTHERWISE = ("long", "wide")  # whose labels say what of theirs is equal


def flops(task: Task) -> float:
    """Of the task's steps, for the tokens of one sample."""
    run, before = task.config().with_vocabulary(VOCABULARY[task.study.corpus]), task.before()
    done = 0 if before is None else before.config().train.steps
    rest = model_costs(run).training * (run.train.steps - done)
    return rest + (0.0 if before is None else flops(before))


@pytest.mark.parametrize(("of", "variant"), TRAINED, ids=lambda value: value.name)
def test_every_variant_has_a_config(of: Study, variant: Variant, tmp_path: Path) -> None:
    task = Task(of, variant, 2, tmp_path)
    run = task.config()
    assert run.run_dir == tmp_path / f"{of.name}-{variant.name}-seed2"
    assert run.evaluate.every and run.evaluate.validation
    assert [each.config().run_dir for each in task.sequence()][-1] == run.run_dir
    if (before := task.before()) is not None:
        assert 0 < before.config().train.steps < run.train.steps


@pytest.mark.parametrize(
    ("of", "variant"),
    [
        (of, its)
        for of, its in TRAINED
        if of in STUDIES and of.name not in ("rates", "balance") and its.name not in OTHERWISE
    ],
    ids=lambda value: value.name,
)
def test_variants_cost_as_much_as_their_reference(of: Study, variant: Variant, tmp_path: Path) -> None:
    reference = of.variant(of.reference)
    owner, name = of.owner_of(reference)
    its = flops(Task(study(owner), study(owner).variant(name), 1, tmp_path))
    more = ROUTERS_OF_64 if variant.name == "e64" else EQUAL
    assert flops(Task(of, variant, 1, tmp_path)) == pytest.approx(its, rel=more)


def test_shared_runs_exist_and_are_of_the_same_config() -> None:
    shared = [(each, variant) for each in EVERY for variant in each.variants if variant.same_as]
    assert shared
    for each, variant in shared:
        owner, name = each.owner_of(variant)
        assert study(owner).path_of(study(owner).variant(name)) == each.path_of(variant)
        assert study(owner).seeds == each.seeds
        assert not study(owner).variant(name).same_as


def test_names_are_distinct_and_panels_and_references_exist() -> None:
    assert len({each.name for each in EVERY}) == len(EVERY)
    for each in EVERY:
        names = [variant.name for variant in each.variants]
        assert len(set(names)) == len(names) and each.reference in names
        assert set(each.panels) <= PANELS.keys()
        assert not each.evaluated or all(variant.program == TRAINER for variant in each.variants)


def made_study(tmp_path: Path) -> tuple[Study, Variant]:
    """A study of 10 steps whose variant is dense for the first 4."""
    config = ROOT / study("captions").config
    start = Start(0.4, ("moe.num_experts=1", "moe.experts_per_token=1"), ("experts", "upcycle", "--num-experts=16"))
    variant = Variant("grown", "grown", ("moe.experts_per_token=2", "train.steps=10"), start=start)
    metric = Metric("captions_perplexity", "perplexity")
    return Study("made", "", "", str(config), "", (metric,), "grown", (variant,)), variant


def test_a_run_with_a_start_is_made_by_three_commands(tmp_path: Path) -> None:
    task = Task(*made_study(tmp_path), 3, tmp_path)
    first, change, last = task.calls()
    begun, grown = tmp_path / "made-grown-start-seed3", tmp_path / "made-grown-seed3"
    assert first.folder == change.folder == begun and last.folder == grown
    assert {"train.steps=4", "optimizer.decay_steps=10", "moe.num_experts=1", "seed=3"} <= set(first.arguments)
    assert change.program == TRAINER
    assert change.arguments == (
        "experts", "upcycle", "--num-experts=16", str(begun), "--out", str(grown), "train.steps=10",
        "evaluate.every=250", "optimizer.decay_steps=null",
    )  # fmt: skip
    assert last.arguments == ("train", str(task.path), *task.overrides)
    grown.mkdir()
    assert task.calls() == [last]  # it was made


def test_a_run_that_is_evaluated_is_trained_first(tmp_path: Path) -> None:
    made, variant = made_study(tmp_path)
    *training, score = Task(replace(made, evaluated=True), variant, 3, tmp_path).calls()
    assert training == Task(made, variant, 3, tmp_path).calls()  # and the run before it is not scored
    folder = tmp_path / "made-grown-seed3"
    assert (score.program, score.arguments, score.folder) == (TRAINER, ("evaluate", str(folder)), folder)


def test_the_evaluation_of_a_run_is_in_the_last_point_of_its_record(tmp_path: Path) -> None:
    made, _ = made_study(tmp_path)
    task = Task(replace(made, evaluated=True), Variant("plain", "plain", ("train.steps=10",)), 3, tmp_path)
    folder = tmp_path / "made-plain-seed3"
    write_run(folder, task.config(), 10, 3_000, 90.5)
    with pytest.raises(
        ValueError, match=rf"^{folder}/report.json does not exist; write it with mmmoe evaluate {folder}$"
    ):
        record_of(task, "commit")
    row = {"metric": "captions_perplexity", "value": 21.5, "n": 7}
    for step in (10, 9):
        report = {"run": "a", "step": step, "date": "", "test": [], "results": [row], "routing": {}, "notes": []}
        (folder / "report.json").write_text(json.dumps(report))
        if step == 10:
            assert record_of(task, "commit").last.scores == {
                "total": 3.0, "captions_perplexity": 20.0, "test/captions_perplexity": 21.5,
            }  # fmt: skip
    with pytest.raises(ValueError, match=r"report.json is of step 9, and the run has 10 steps; write it with mmmoe "):
        record_of(task, "commit")


def write_run(folder: Path, config: run_config.RunConfig, step: int, tokens: int, seconds: float) -> None:
    """What a run leaves that its record is made of."""
    folder.mkdir()
    run_config.dump(config.with_vocabulary(2048), folder / "config.yaml")
    held_out = {"losses": {"total": 3.0}, "scores": {"captions_perplexity": 20.0}}
    line = {"step": step, "tokens_total": tokens, "routing": [], "held_out": held_out}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / EVENTS).touch()
    (folder / COST).write_text(json.dumps({"seconds": seconds, "running": False}))


def test_a_record_counts_the_flops_and_the_time_of_both_parts(tmp_path: Path) -> None:
    task = Task(*made_study(tmp_path), 3, tmp_path)
    before = task.before()
    assert before is not None
    write_run(tmp_path / "made-grown-start-seed3", before.config(), 4, 1_000, 60.0)
    write_run(tmp_path / "made-grown-seed3", task.config(), 10, 3_000, 90.5)
    dense, sparse = (model_costs(t.config().with_vocabulary(2048)).training for t in (before, task))
    record = record_of(task, "commit")
    assert record.flops_at(record.last) == pytest.approx(1_000 * dense + 2_000 * sparse)
    assert sparse > 1.25 * dense
    assert record.core_seconds == 150.5
