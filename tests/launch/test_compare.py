"""The comparison of the MoE model with its dense baseline: equal arithmetic, and honest sums."""

from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.launch.compare import dense_overrides, markdown, summarise, train_and_evaluate
from mmmoe_pretrain.models.mmmoe import MMMoE

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def report(value: float) -> dict:
    return {"results": [{"metric": "image_to_text_r10", "value": value, "unit": "share", "chance": 0.05,
                         "majority": None, "n": 173}]}  # fmt: skip


def test_the_dense_model_has_the_active_parameters_of_the_moe_model() -> None:
    moe = run_config.load(DEMO).with_vocabulary(64)
    dense = run_config.load(DEMO, dense_overrides(moe)).with_vocabulary(64)

    def active(config: run_config.RunConfig) -> float:
        share = config.moe.experts_per_token / config.moe.num_experts
        return sum(p.numel() * (share if ".experts." in name else 1)
                   for name, p in MMMoE(config).trunk.named_parameters() if "router" not in name)  # fmt: skip

    assert active(dense) == active(moe)


def test_seeds_are_summed_up_as_mean_and_sample_deviation() -> None:
    (row,) = summarise([report(0.2), report(0.3), report(0.4)])
    assert row["value"] == pytest.approx(0.3)
    assert row["std"] == pytest.approx(0.1)
    assert row["values"] == [0.2, 0.3, 0.4]


def test_the_page_shows_both_models_beside_chance() -> None:
    sides = {name: {"test": [], "results": summarise([report(v)])} for name, v in (("moe", 0.3), ("dense", 0.2))}
    page = markdown({"date": "2026-01-01", "config": "c.yaml", "steps": 1, "seeds": [1], "ranks": 2, **sides})
    assert "| image_to_text_r10 | 5.0% | - | 20.0% ± 0.0% | 30.0% ± 0.0% | 173 |" in page


def test_scores_of_another_recipe_are_not_passed_off_as_this_one(tmp_path: Path) -> None:
    overrides = [f"runs_dir={tmp_path}"]
    other = run_config.load(DEMO, ["name=old", "train.steps=7", *overrides])
    other.run_dir.mkdir(parents=True)
    run_config.dump(other, other.run_dir / "config.yaml")
    (other.run_dir / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="was trained under another config"):
        train_and_evaluate(DEMO, "old", overrides, ranks=2)
