"""The page shows what the records have, and the same records give the same bytes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from evidence import __main__ as command
from evidence import page, pictures, records
from evidence.__main__ import Place, tasks_of
from evidence.pages import PAGES
from evidence.records import Record
from evidence.study import Variant
from tests.evidence.samples import STUDY, point, record, write_study


def rendered(tmp_path: Path, by_variant: dict[str, list[float]], panels: tuple[str, ...] = ("steps",)) -> str:
    """The page; of one panel, since pictures take most of the time."""
    write_study(tmp_path / "records", by_variant)
    return page.write(tmp_path / "docs", tmp_path / "records", (replace(STUDY, panels=panels),)).read_text()


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table by the label of their row, without the number of its seeds."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {label.partition(" (")[0].strip(): cells for label, *cells in lines[1:]}


def test_the_committed_pages_are_those_of_the_committed_records(tmp_path: Path) -> None:
    """Else write it again: python -m evidence --render."""
    committed, readme = command.Place(), tmp_path / "README.md"
    assert committed.readme is not None
    readme.write_bytes(committed.readme.read_bytes())
    command.render(list(PAGES.values()), replace(committed, docs=tmp_path, readme=readme))
    assert readme.read_bytes() == committed.readme.read_bytes()
    for name in PAGES:
        made = {path.relative_to(tmp_path) for path in (tmp_path / name).iterdir()}
        assert {path.relative_to(committed.docs) for path in (committed.docs / name).glob("*")} == made
        for path in (Path(f"{name}.md"), *made):
            assert (tmp_path / path).read_bytes() == (committed.docs / path).read_bytes(), path


def test_every_committed_record_is_one_of_a_study() -> None:
    known = {records.path_of(task.study.name, task.variant.name, task.seed)
             for each in PAGES.values() for task in command.tasks_of(each.studies, command.Place())}  # fmt: skip
    assert set(records.FOLDER.rglob("*.json")) <= known


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    made = {"dense": [20.0, 21.0, 22.0], "four": [18.0, 19.0], "more": [15.0]}
    for name in ("one", "other"):
        rendered(tmp_path / name, made, STUDY.panels)
    for path in ("evidence.md", "evidence/names.svg"):
        assert (tmp_path / "one/docs" / path).read_bytes() == (tmp_path / "other/docs" / path).read_bytes()


def test_sweeps_are_of_a_metric_each_with_an_axis_that_suits_the_values() -> None:
    panels = ("sweep", "sweep of the second metric")
    for xs, scale in (((0.0, 30.0, 60.0, 90.0), "linear"), ((0.0, 0.002, 0.2), "symlog")):
        variants = tuple(Variant(f"x{x}", f"{x}", line="a line", x=x) for x in xs)
        of = replace(STUDY, variants=variants, panels=panels, axis="weight")
        runs = {variant.name: {1: record(variant.name, 1, 20.0 + x)} for variant, x in zip(variants, xs, strict=True)}
        for ax, value, name in zip(
            pictures.figure_of(of, runs).axes, (20.0, 25.0), ("perplexity", "recall"), strict=True
        ):
            assert ax.get_xscale() == scale and ax.get_ylabel().startswith(f"held-out {name}")
            line = ax.get_lines()[0]  # the others are caps of intervals
            assert line.get_xdata().tolist() == list(xs) and line.get_ydata()[0] == value


def test_a_row_has_mean_interval_and_paired_change(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"dense": [20.0, 22.0, 24.0], "four": [18.0, 19.8, 21.6]})
    # s of 20, 22, 24 is 2: 4.303 * 2 / sqrt(3) = 4.97; every value of the other row is 0.9 of its pair
    assert rows(text)["dense"] == [
        "12.0k", "3.0k", "2.50", "0.50", "22.00 ± 4.97", "reference", "25.0% ± 0.0%", "reference",
    ]  # fmt: skip
    assert rows(text)["4 experts"][4:] == ["19.80 ± 4.47", "-10.0% (-10.0 to -10.0)", "25.0% ± 0.0%",
                                           "+0.0% (+0.0 to +0.0)"]  # fmt: skip
    assert "Compared with *dense* by perplexity of names. Better: 4 experts (10.0% lower).\n" in text


def test_what_the_interval_does_not_show_is_not_said(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"dense": [20.0, 22.0, 24.0], "four": [19.0, 23.0, 23.5], "more": [30.0, 33.0, 36.0]})
    assert "No clear difference: 4 experts. Worse: 16 experts (50.0% higher)." in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"dense": [20.0, 21.0], "four": [18.0]})
    assert rows(text)["4 experts"][4:6] == ["18.00", "-10.0%"]
    assert "\n| dense (2 seeds) | " in text and "\n| 4 experts (1 seed) | " in text
    assert "Without an interval: 4 experts (10.0% lower)." in text
    assert "Not run: dense (seed 3); 4 experts (seeds 2, 3); 16 experts.\n" in text


def test_seeds_that_only_one_of_two_variants_has_do_not_count_as_change(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"dense": [20.0, 1000.0], "four": [18.0]})
    assert rows(text)["4 experts"][5] == "-10.0%"


def test_without_the_reference_there_is_no_change(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"four": [18.0]})
    assert list(rows(text)) == ["4 experts"]
    assert rows(text)["4 experts"][5] == "-"
    assert "Compared with" not in text


def test_a_score_of_zero_has_no_ratio(tmp_path: Path) -> None:
    for variant, recall in (("dense", 0.0), ("four", 0.1)):
        records.write(record(variant, points=[point(30, 20.0, recall)]), tmp_path / "records")
    text = rendered(tmp_path, {})
    assert rows(text)["4 experts"][6:] == ["10.0%", "-"]


def test_a_study_without_records_says_so(tmp_path: Path) -> None:
    text = rendered(tmp_path, {})
    assert text == page.HEAD + "\n## Names of things\nWhich is better? Not run yet.\n"
    assert not list((tmp_path / "docs" / "evidence").iterdir())


def test_a_wide_table_has_a_row_a_metric_and_a_study_without_panels_no_picture(tmp_path: Path) -> None:
    wide = replace(STUDY, metrics=STUDY.metrics * 2, panels=())  # 5 columns, and two for each of 4 metrics
    write_study(tmp_path / "records", {"dense": [20.0], "four": [18.0]})
    text = page.write(tmp_path, tmp_path / "records", (wide,)).read_text()
    assert "|  | dense (1 seed) | 4 experts (1 seed) |\n|---|---|---|\n| parameters | 12.0k | 12.0k |\n" in text
    assert "| perplexity of names | 20.00 | 18.00 |\n| change | reference | -10.0% |\n" in text
    assert "![" not in text and not list((tmp_path / "evidence").iterdir())


def test_the_readme_has_the_table_of_each_study_that_it_names(tmp_path: Path) -> None:
    readme, other = tmp_path / "README.md", replace(STUDY, name="other")
    write_study(tmp_path / "records", {"dense": [20.0]})
    places = [page.BEGIN.format(name) + "before\n" + page.END for name in ("other", "names")]
    readme.write_text("One\n{}Two\n{}Three\n".format(*places))
    page.write_readme(readme, tmp_path / "records", (STUDY, other))
    text = readme.read_text()
    one, two = text.partition("Two\n")[::2]
    assert one == "One\n" + places[0].replace("before", "Not run yet: `make evidence ONLY=other`.")
    picture = "![Names of things](docs/evidence/names.svg)\n\n|  | parameters"
    assert two.startswith(page.BEGIN.format("names") + picture) and two.endswith(page.END + "Three\n")
    assert "before" not in two and rows(two)["dense"][4] == "20.00"
    page.write_readme(readme, tmp_path / "records", (STUDY, other))
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text",
    ["Words.\n", page.BEGIN.format("names"), page.BEGIN.format("another") + page.END,
     page.BEGIN.format("names") + page.END + page.END, 2 * page.BEGIN.format("names") + page.END],
)  # fmt: skip
def test_a_readme_whose_places_are_not_clear_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README.md has no place for the table .* with a STUDY of names$"):
        page.write_readme(readme, tmp_path / "records", (STUDY,))
    assert readme.read_text() == text


def test_the_origin_tells_dates_machine_commit_and_cost(tmp_path: Path) -> None:
    records.write(record("four", commit="fedcba98765432+", core_seconds=None), tmp_path / "records")
    text = rendered(tmp_path, {"dense": [20.0, 21.0]})
    assert (
        "`evidence/configs/captions.yaml`, 30 steps; 3 runs of 2026-01-01 to 2026-01-02 on A CPU, 1.0 core-hours "
        "without 1 of unknown cost; commits 0123456789 and fedcba9876 with changes. Not run: "
    ) in text
    assert rows(text)["4 experts"][3] == "-"


def test_no_figure_of_the_page_is_without_a_record(tmp_path: Path) -> None:
    section = rendered(tmp_path, {"dense": [20.0, 22.0, 24.0], "four": [18.0, 19.8, 21.6]}).partition("## Names")[2]
    of_records = {"12.0", "3.0", "2.50", "0.50", "25.0", "30", "2026", "01", "03", "0123456789"}
    worked_out = {"22.00", "4.97", "19.80", "4.47", "10.0", "0.0", "6", "3.0"}  # above; and 6 runs in 3 core-hours
    of_labels = {"4", "16"}
    assert set(re.findall(r"\d+(?:\.\d+)?", section)) <= of_records | worked_out | of_labels


def test_remarks_end_the_section_of_their_study(tmp_path: Path) -> None:
    write_study(tmp_path / "records", {"dense": [20.0]})
    text = page.write(tmp_path, tmp_path / "records", (STUDY,), {"names": ["One.", "Two."]}).read_text()
    assert text.endswith("16 experts.\n\nOne.\n\nTwo.\n")


def test_runs_of_another_study_count_where_they_are_the_same(tmp_path: Path) -> None:
    write_study(tmp_path / "records", {"dense": [20.0, 21.0]})
    (dense, *others) = STUDY.variants
    other = replace(STUDY, name="other", variants=(replace(dense, name="base", same_as="names/dense"), *others),
                    reference="base")  # fmt: skip
    assert records.read_study(other, tmp_path / "records").keys() == {"base"}
    assert "Not run yet" in page.write(tmp_path, tmp_path / "records", (other,)).read_text()  # a row of its own
    records.write(replace(record("four"), study="other"), tmp_path / "records")
    assert rows(page.write(tmp_path, tmp_path / "records", (other,)).read_text())["dense"][4].startswith("20.50")


def test_a_variant_may_be_another_score_of_the_runs_of_one(tmp_path: Path) -> None:
    """A recall of 25% in place of the perplexity, of the run itself and as the reference of others."""
    write_study(tmp_path / "records", {"dense": [25.0, 25.0], "four": [0.5, 0.5]})
    dense, four, _ = STUDY.variants
    by_recall = replace(dense, name="recall", label="by recall", same_as="names/dense",
                        scores=(("perplexity", "recall"),))  # fmt: skip
    study = replace(STUDY, variants=(dense, four, by_recall), metrics=STUDY.metrics[:1])
    found = rows(page.write(tmp_path, tmp_path / "records", (study,)).read_text())
    assert found["by recall"][4:6] == ["0.25 ± 0.00", "-99.0% (-99.0 to -99.0)"]
    found = rows(page.write(tmp_path, tmp_path / "records", (replace(study, reference="recall"),)).read_text())
    assert found["4 experts"][4:6] == ["0.50 ± 0.00", "+100.0% (+100.0 to +100.0)"]
    tasks = tasks_of([study], Place(), seeds=[1])
    assert [task.name for task in tasks] == ["names-dense-seed1", "names-four-seed1"]


def test_pictures_draw_what_the_records_have(tmp_path: Path) -> None:
    drawn = axes_of(tmp_path, {"dense": [20.0, 20.0], "four": [10.0, 12.0], "more": [9.0]})
    steps, flops, hours, experts, specialisation, load = drawn
    dense, four, more = steps.lines
    assert [list(line.get_xdata()) for line in (dense, four, more)] == [[10, 20, 30]] * 3
    assert list(four.get_ydata()) == [44, 22, 11]
    assert list(flops.lines[0].get_xdata()) == pytest.approx([2.5e6 * 100 * n / 1e15 for n in (10, 20, 30)])
    assert list(hours.lines[0].get_xdata()) == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert list(experts.lines[0].get_ydata()) == [20, 11, 9]
    assert [label.get_text() for label in experts.get_xticklabels()] == ["dense", "4", "16"]
    assert list(specialisation.lines[0].get_ydata()) == pytest.approx([20] * 3)  # the mean of 0.1 and 0.3
    assert list(load.lines[0].get_ydata()) == [2.0] * 3
    low, high = steps.get_ylim()
    assert 0 < low < 9
    assert high > 80


def axes_of(tmp_path: Path, made: dict[str, list[float]]) -> list:
    """Of the picture of these perplexities, beside the records that are there."""
    write_study(tmp_path, made)
    return pictures.figure_of(STUDY, records.read_study(STUDY, tmp_path)).axes


def test_a_run_of_unknown_cost_is_not_drawn_by_hours(tmp_path: Path) -> None:
    records.write(record("more", core_seconds=None), tmp_path)
    hours = axes_of(tmp_path, {"dense": [20.0], "four": [18.0]})[2]
    assert [line.get_label() for line in hours.lines] == ["dense", "4 experts"]


def test_models_of_one_expert_have_no_curve_of_routing(tmp_path: Path) -> None:
    one: Record = record("dense", load=[{"image": [1.0]}])
    records.write(one, tmp_path)
    assert [line.get_label() for line in axes_of(tmp_path, {"four": [18.0]})[4].lines] == ["4 experts"]
