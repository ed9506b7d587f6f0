"""The parity matrix of a few cases and steps (make parity: of all), and that it would notice."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.layouts import matrix
from tests.layouts.cases import ALONE, LAYOUTS, all_cases, brief, cover
from tests.layouts.train import assemble, reference

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases
THREE_MEET = [case for case in all_cases() if case.name == "TP2 x EP2 deepspeed ZeRO-3 fp32"]
CASES = [brief(case) for case in cover(all_cases(), THREE_MEET)]
STEPS = 2  # the second is made with weights, moments and prefetch orders that the first has left


@pytest.fixture(scope="module")
def comparisons() -> dict[str, matrix.Comparison]:
    return {comparison.case.name: comparison for comparison in matrix.run(CASES, STEPS)}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_the_layout_equals_one_process(comparisons: dict[str, matrix.Comparison], name: str) -> None:
    assert comparisons[name].passed, comparisons[name]


def test_every_layout_is_there() -> None:
    assert len(THREE_MEET) == 1
    assert {case.layout for case in all_cases()} == set(LAYOUTS)
    assert len({case.name for case in all_cases()}) == len(all_cases())
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {(case.engine, case.zero_stage) for case in CASES} == {(c.engine, c.zero_stage) for c in all_cases()}


def test_the_page_tells_of_every_layout() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:6]) for line in page.splitlines()}
    for case in all_cases():
        assert (case.layout, str(case.ranks), case.engine, str(case.zero_stage), case.precision) in rows, case.name


def test_what_differs_is_seen() -> None:
    alone = reference(ALONE, STEPS)
    case = all_cases()[0]
    assert matrix.compare(case, [alone, alone], alone).passed
    other_norm = dataclasses.replace(alone, norms=[norm * 1.001 for norm in alone.norms])
    assert not matrix.compare(case, [alone, other_norm], alone).passed
    other_loss = dataclasses.replace(alone, losses=[{**step, "total": step["total"] + 1e-3} for step in alone.losses])
    assert not matrix.compare(case, [other_loss, alone], alone).passed
    name = "mmmoe.trunk.blocks.1.ffn.experts.up"
    shape, [(offset, numbers)] = alone.parameters[name]
    half = numbers.shape[0] // 2
    lost = dataclasses.replace(alone, parameters={**alone.parameters, name: (shape, [(offset, numbers[:half])])})
    assert "on no rank" in matrix.compare(case, [lost], alone).problem
    moved = dataclasses.replace(alone, parameters={**alone.parameters, name: (shape, [(offset, numbers + 1e-4)])})
    assert not matrix.compare(case, [moved], alone).passed
    shape, [(offset, moment)] = alone.moments[name]
    doubled = dataclasses.replace(alone, moments={**alone.moments, name: (shape, [(offset, 2 * moment)])})
    assert matrix.compare(case, [doubled], alone).gradient == pytest.approx(1.0)
    assert "replicas" in matrix.compare(case, [alone, moved], alone).problem
    np.testing.assert_array_equal(assemble([alone.parameters], name), numbers)


def test_the_table_takes_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n", encoding="utf-8")
    matrix.write(page, "| new |")
    assert page.read_text(encoding="utf-8") == f"before\n{matrix.BEGIN}\n| new |\n{matrix.END}\nafter\n"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="has no place for the table"):
        matrix.write(page, "| new |")
