"""mmmoe plan as a user sees it: every config with the number of GPUs that it is made for, a search, two plans side by
side, and what is refused."""

from __future__ import annotations

import gc
import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.cli import app
from mmmoe_pretrain.plan import build as build_module
from mmmoe_pretrain.plan.layouts import legal
from mmmoe_pretrain.plan.machines import GPUS
from mmmoe_pretrain.plan.report import Asked
from mmmoe_pretrain.plan.search import Ranked, Search
from mmmoe_pretrain.plan.tables import MEMORY
from tests.support import tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
PAPER = {"limoe_b16": (8, 0.5e9, 0.1e9), "limoe_l16": (32, 1.7e9, 0.3e9), "limoe_h14": (128, 5.6e9, 675e6)}
NAMED = {"mmmoe_1b_a300m": (8, 1e9, 0.3e9), "mmmoe_30b_a3b": (64, 30e9, 3e9), "mmmoe_200b_a20b": (1024, 200e9, 20e9)}


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of a config whose data and tokenizer are not there."""
    train = {"global_batch_size": 16, "num_microbatches": 2, "precision": "bf16"}
    model = {**MODEL, "vocab_size": 0}
    run_config.dump(tiny_config(tmp_path, model=model, train=train), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("name", [*PAPER, *NAMED])
def test_a_big_config_has_its_parameters_and_fits(name: str) -> None:
    """Within 3% of the paper's total; its active parameters where it gives them to more than one digit."""
    gpus, total, active = (PAPER | NAMED)[name]
    values = found(CONFIGS / f"{name}.yaml", "--gpus", gpus)
    assert values["parameters"]["total"] == pytest.approx(total, rel=0.03)
    assert values["parameters"]["active"] == pytest.approx(active, rel=0.01 if name == "limoe_h14" else 0.15)
    assert values["memory"]["fits"], values["memory"]
    assert 0.1 < values["step"]["mfu"] < 0.6


def test_the_table_has_the_numbers_of_the_json(tiny: Path) -> None:
    values, text = found(tiny, "--gpus", 2, "--tokens", "3B"), plan(tiny, "--gpus", 2, "--tokens", "3B").stdout
    assert f"{values['memory']['total'] / 1e9:,.2f} of 80.00" in text
    assert f"{1e3 * values['step']['seconds']:,.1f}" in text
    assert "3.00 B tokens take" in text
    for name, value in values["memory"]["terms"].items():
        assert re.search(rf"^  {re.escape(MEMORY.get(name, name))} +{value / 1e9:,.2f}$", text, re.MULTILINE), name
    assert MEMORY.keys() <= values["memory"]["terms"].keys()
    assert f"limit: {values['limit']}" in text
    assert "assumed: a vocabulary of 32,000, as there is no tokenizer at" in text


def test_a_search_lists_the_fastest_layouts_that_fit_by_the_real_build(tiny: Path) -> None:
    whole = ["model.num_heads=1", "model.num_layers=1", "moe.every=1"]  # neither tensor nor pipeline parallel
    values = found(tiny, *whole, "--gpus", 2, "--search")
    assert values["legal"] == 2 * (2 + 4) * 3  # expert 1 or 2, ZeRO stages of both engines, recomputation
    seconds = [each["step"]["seconds"] for each in values["best"]]
    assert seconds == sorted(seconds)
    assert seconds == pytest.approx([each["closed"]["seconds"] for each in values["best"]])
    memory = [each["memory"]["total"] for each in values["best"]]
    assert memory == pytest.approx([each["closed"]["memory"] for each in values["best"]], rel=0.02)
    why = " ".join(each["why"] for each in values["beside"])
    assert "refused: parallel.zero_stage 2" in why or "longer" in why
    again = found(tiny, *whole, *values["best"][0]["overrides"], "--gpus", 2)
    assert again["step"] == values["best"][0]["step"]


def test_a_search_leaves_out_what_the_real_build_does_not_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layouts that fit by the closed form, the faster one does not by the real build."""
    config, asked = run_config.load(tiny, ["model.vocab_size=64"]), Asked(1, GPUS["h100"])
    ranked = [Ranked(candidate, n, 1.0) for n, candidate in enumerate(islice(legal(config, 1), 2))]
    fits = {each.candidate.config.train.recompute: each.seconds > 0 for each in ranked}
    monkeypatch.setattr(Search, "by_time", lambda _: ([], 2))
    monkeypatch.setattr(Search, "fitting", lambda *_: iter(ranked))
    monkeypatch.setattr(Search, "why_not", lambda _, best: [(best.candidate.choice, "")])
    module = sys.modules[Search.__module__]
    monkeypatch.setattr(module, "values_of", lambda _, its, __: {"memory": {"fits": fits[its.train.recompute]}})
    frozen = gc.get_freeze_count()
    found = module.search(asked, config, [])
    assert gc.get_freeze_count() >= frozen > 0, "by tests/conftest.py: it must stay so"
    assert [each["overrides"] for each in found["best"]] == [ranked[1].candidate.choice.overrides]
    assert found["beside"][0]["layout"] == str(ranked[1].candidate.choice)


def test_groups_of_many_ranks_are_made_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a plan of thousands of ranks."""
    made = []
    original = build_module.build_groups
    monkeypatch.setattr(build_module, "build_groups", lambda layout: made.append(layout) or original(layout))
    assert found(tiny, "--gpus", 4, "--gpus-per-node", 2)["layout"]["data"] == 4
    assert len(made) == 1


def test_an_imbalance_without_end_is_refused(tiny: Path) -> None:
    result = plan(tiny, "--gpus", 2, "--imbalance", "inf")
    assert result.exit_code == 2 and "--imbalance" in result.output


def test_two_plans_side_by_side_have_their_differences_first(tiny: Path) -> None:
    text = plan(tiny, "--gpus", 2, "--compare", "parallel.zero_stage=0", "parallel.zero_stage=1").stdout
    differs, _, equal = text.partition("\nequal: ")
    assert "memory.terms.moments" in differs
    assert "parameters.total" in equal


def test_the_memory_of_a_gpu_may_be_given_and_small_sizes_are_in_mb(tiny: Path) -> None:
    text = plan(tiny, "--gpus", 2, "--gpu", "cpu", "--memory", 0.02, "--compare", "seed=1", "seed=2").stdout
    assert "memory.capacity" in text.partition("equal: ")[2]
    alone = plan(tiny, "--gpus", 2, "--gpu", "cpu", "--memory", 0.02).stdout
    assert " of 20.00\n" in alone and "assumed: links of 1 GB/s and 100 us, which were not measured" in alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2", "--gpu", "h1000"], "'h1000' is not a known machine; use one of h100"),
        (["--gpus", "2", "--machine", "none.json"], "--machine none.json: there is no such file"),
        (["--gpus", "2", "--gpu", "h100", "--machine", "none.json"], "both name a machine; give one of them"),
        (["--gpus", "2", "--search", "--compare", "a=1", "b=2"], "--compare and --search cannot be given together"),
        (["--gpus", "1000000"], "train.global_batch_size 16 does not divide into"),
        (["--gpus", "2", "parallel.tensor_parallel_size=4"], "does not divide the 2 that run"),
        (["--gpus", "3"], "train.global_batch_size 16 does not divide into train.num_microbatches 2 x 3"),
        (["--gpus", "7", "--search", "train.num_microbatches=16"], "no layout is possible"),
        (["--gpus", "2", "--tokens", "many"], "--tokens many is not a number of tokens"),
        (["--gpus", "2", "--compare", "a", "b.yaml"], "override 'a' is not key=value"),
        ([], "--gpus is missing"),
        (["--gpus", "9", "--gpus-per-node", "4"], "--gpus 9 does not fill nodes of --gpus-per-node 4"),
        (["--gpus", "9", "--gpus-per-node", "4", "--search"], "e.g. --gpus 8, or another --gpus-per-node"),
        (["--gpus", "6", "--gpus-per-node", "3", "moe.num_experts=8", "parallel.expert_parallel_size=2",
          "train.global_batch_size=12"], "splits the 2 ranks that share matrices and experts (tensor 1 x expert 2)"),
        (["--gpus", "6", "--gpus-per-node", "3", "train.global_batch_size=12", "--compare", "seed=1",
          "parallel.expert_parallel_size=2"], "--gpus-per-node 3 splits the 2 ranks"),
        (["--calibrate", "--machine", "."], "--machine . is a folder, and --calibrate writes a file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_message(tiny: Path, arguments: list[str], message: str) -> None:
    result = plan(tiny, *arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_calibration_never_replaces_its_config(tiny: Path) -> None:
    before = tiny.read_text(encoding="utf-8")
    result = plan(tiny, "--calibrate", "--machine", str(tiny))
    assert "is the config, which --calibrate would overwrite" in str(result.exception)
    assert tiny.read_text(encoding="utf-8") == before


def test_lending_is_left_out_and_the_rows_from_which_it_pays_are_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Products of 16 numbers on an H100: 989.4 TFLOP/s x 0.185 x 16 / 128 = 22.88, and 2 x 2 bytes / 6 of that are
    # 15.25 TB/s. Divided by 0.67 x 450 GB/s inside a node, and by 0.86 x 50 GB/s across nodes.
    moe = ["moe.num_experts=4", "moe.expert_hidden_size=16", "moe.lending={min_rows: 7}", "model.vocab_size=48"]
    lent, unlent = found(tiny, *moe, "--gpus", 2), found(tiny, *moe, "moe.lending=null", "--gpus", 2)
    (told,) = (line for line in lent["assumptions"] if "lending" in line)
    assert "about 51 rows of an expert inside a node and 355 across nodes (moe.lending.min_rows is 7)" in told
    assert lent["memory"] == unlent["memory"] and lent["step"] == unlent["step"]
    monkeypatch.setattr("mmmoe_pretrain.plan.search.LISTED", 1)  # all plans have the same assumptions
    (best,) = found(tiny, *moe, "--gpus", 2, "--search")["best"]
    assert told in best["assumptions"]
