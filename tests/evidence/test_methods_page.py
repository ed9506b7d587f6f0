"""The page of methods shows what the records have; a method differs from its baseline by its own settings alone."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from evidence import methods_page, records
from evidence.__main__ import Place, tasks_of
from evidence.methods import ITEMS, METHODS, SHARED, study
from evidence.pages import PAGES, methods_of
from evidence.records import Machine
from evidence.studies import STUDIES
from evidence.study import ROOT, Method, Study, Variant
from evidence.survey_map import HEADINGS, section
from mmmoe_pretrain import config as run_config
from tests.evidence.samples import STUDY, record

QUEUE = Method("memory_queue", "memory queue", item="alignment", paper="XBM")
MADE = replace(
    STUDY, name="pairs", config="evidence/configs/retrieval.yaml", reference="dense", panels=(),
    metrics=STUDY.metrics[:1], variants=(Variant("dense", "dense"), QUEUE),
)  # fmt: skip


def row(tmp_path: Path, study: Study = MADE) -> list[str]:
    """Cells of the one method, from the column of its data on."""
    text = methods_page.write(tmp_path, tmp_path, (study,)).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| memory queue | XBM | ")]
    return line[2:-2].split(" | ")[3:]


def write(folder: Path, variant: str, values: list[float], **more: object) -> None:
    """Records with these perplexities, from seed 1 on, of 1800 core-seconds."""
    for seed, value in enumerate(values, start=1):
        records.write(record(variant, seed, value, study="pairs", **more), folder)


def test_a_row_has_both_values_the_paired_change_and_the_ratio_of_costs(tmp_path: Path) -> None:
    write(tmp_path, "dense", [20.0, 22.0, 24.0])
    write(tmp_path, "memory_queue", [18.0, 19.8, 21.6], core_seconds=1980.0)
    assert row(tmp_path) == [
        "Names of things", "perplexity of names", "22.00 ± 4.97", "19.80 ± 4.47", "-10.0% (-10.0 to -10.0)",
        "1.10 (1.10 to 1.10)",
    ]  # fmt: skip


def test_what_was_not_run_has_no_figure(tmp_path: Path) -> None:
    assert row(tmp_path)[2:] == ["not run yet", "not run yet", "-", "-"]
    write(tmp_path, "dense", [20.0, 22.0])
    assert row(tmp_path)[2:] == ["21.00 ± 12.71 (2 seeds)", "not run yet", "-", "-"]
    write(tmp_path, "memory_queue", [18.0])
    assert row(tmp_path)[2:] == ["21.00 ± 12.71 (2 seeds)", "18.00 (1 seed)", "-10.0%", "1.00"]


@pytest.mark.parametrize("more", [{"core_seconds": None}, {"machine": Machine("Another CPU", 2, "2.0")}])
def test_costs_that_are_unknown_or_of_other_machines_are_not_compared(more: dict, tmp_path: Path) -> None:
    write(tmp_path, "dense", [20.0])
    write(tmp_path, "memory_queue", [18.0], **more)
    assert row(tmp_path)[4:] == ["-10.0%", "-"]


def test_the_page_lists_the_settings_of_a_method_and_the_items_without_one(tmp_path: Path) -> None:
    write(tmp_path, "memory_queue", [18.0])
    text = methods_page.write(tmp_path, tmp_path, (MADE,), {"pairs": ["A remark."]}).read_text()
    assert "\n- `memory_queue`: `objectives.pairs.queue_size: 512`, `objectives.pairs.queue_start: 400`.\n" in text
    for item, title in ITEMS.items():
        assert (f"## {title}\nNone yet.\n" in text) == (item != "alignment")
    section = text.partition("## Names of things\n")[2]
    assert "| memory queue (1 seed) | 12.0k | 3.0k | 2.50 | 0.50 | 18.00 | - |" in section
    assert section.endswith("Not run: dense; memory queue (seeds 2, 3).\n\nA remark.\n")


@pytest.mark.parametrize(
    ("of", "method"), [(of, method) for of in METHODS for method in methods_of(of)], ids=lambda value: value.name
)
def test_a_method_is_its_baseline_but_for_what_it_declares(of: Study, method: Method) -> None:
    """Else the change would not be the method's."""
    assert method.item in ITEMS and method.paper
    assert run_config.load(of.path_of(method)).name == method.name
    changed = methods_page.differences(of, method)
    assert changed or method.name == of.reference
    other = {key for key in changed if key.split(".")[0] in SHARED}
    assert other == set(method.also), "settings of the baseline that the method changes; declare them in `also`"


def test_studies_of_a_page_are_chosen_by_the_names_of_their_methods(tmp_path: Path) -> None:
    page = replace(PAGES["methods"], studies=(MADE, replace(MADE, name="others", variants=MADE.variants[:1])))
    assert [(each.name, len(each.variants)) for each in page.of(["memory_queue"]).studies] == [("pairs", 2)]
    assert page.of(["pairs", "memory_queue"]).studies == (MADE,)
    with pytest.raises(ValueError, match=r"no study 'dense'; there are pairs, others, memory_queue$"):
        page.of(["dense"])


def test_runs_that_a_page_shows_of_another_study_are_its_tasks_too() -> None:
    (of,) = [each for each in METHODS if each.name == "europe"]
    tasks = tasks_of([replace(of, variants=of.variants[:2])], Place(), seeds=[1])
    assert [task.name for task in tasks] == ["retrieval-e16-seed1", "europe-sigmoid_contrastive-seed1"]


def test_sizes_for_small_runs_follow_those_of_all_and_stay_away_from_full_runs() -> None:
    of = replace(MADE, variants=(replace(QUEUE, small=("objectives.pairs.queue_size=16",)),), seeds=(1,))
    (full,), (quick,) = (tasks_of([of], replace(Place(), extra=extra)) for extra in ((), ("train.steps=6",)))
    assert full.config().objectives["pairs"].queue_size == 512 and full.config().train.steps == 600
    assert quick.config().objectives["pairs"].queue_size == 16 and quick.config().train.steps == 6


def test_the_map_of_the_surveys_has_files_and_runs_that_are_there_and_every_method() -> None:
    """``tests/methods`` trains the configs."""
    mapped = set()
    for heading in HEADINGS:
        assert all((ROOT / file).is_file() for file in heading.files), heading
        for run in heading.runs:
            name, _, variant = run.partition("/")
            mapped.add(study(name).variant(variant).name)
        assert heading.files or heading.missing, heading
    methods = {each.name for of in METHODS for each in of.variants if isinstance(each, Method)}
    assert not methods - mapped


def test_the_map_has_the_change_of_a_method(tmp_path: Path) -> None:
    of = study("europe")
    for variant, value in (("baseline", 0.2), ("masked", 0.25)):
        owner, name = of.owner_of(of.variant(variant))
        made = record(name, 1, value, study=owner)
        points = [replace(point, scores={of.metrics[0].name: value}) for point in made.points]
        records.write(replace(made, points=points), tmp_path)
    text = section((*STUDIES, *METHODS), tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("| Representation: self-supervised")]
    assert "masked modelling: +25.0% (recall@1 of the image); masked autoencoder: not run yet" in line
    assert "[`masked.yaml`](../configs/methods/masked.yaml)" in line


def test_small_runs_of_tasks_have_labels_of_the_small_corpus() -> None:
    with tarfile.open(ROOT / "tests" / "assets" / "mini" / "mini.tar") as corpus:
        file = next(corpus.extractfile(member) for member in corpus if member.name.endswith("manifest.jsonl"))
        assert file is not None
        rows = [row for row in map(json.loads, file) if row["subset"] == "constructed"]  # evidence/data.sh mini
    tasks = tasks_of(
        [each for each in METHODS if each.name == "tasks"], replace(Place(), extra=("seed=1",)), seeds=[1]
    )
    assert len(tasks) == 5
    for task in tasks:
        groups = task.config().objectives["groups"]
        assert {row[groups.field] for row in rows} & set(groups.classes), task.name
