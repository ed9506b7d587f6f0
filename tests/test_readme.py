"""What the README shows must be what the code accepts."""

import json
import re
from pathlib import Path

import yaml

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import kinds
from mmmoe_pretrain.config import CheckpointConfig, FaultsConfig, LossScaleConfig
from mmmoe_pretrain.config.moe import LendingConfig, MoEConfig
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_run_of_the_tour_is_a_valid_config() -> None:
    (block,) = blocks("yaml")
    assert run_config.parse(yaml.safe_load(block)).train.precision == "bf16"


def test_the_settings_of_the_layer_s_page_are_valid_and_its_defaults_are_ours() -> None:
    page = (Path(__file__).parents[1] / "docs" / "expert_layer.md").read_text(encoding="utf-8")
    mixture, budgets, lending = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert MoEConfig.model_validate(yaml.safe_load(mixture)["moe"]).for_layer(3).experts_per_token == 4
    assert MoEConfig.model_validate(yaml.safe_load(budgets)["moe"]).auto_layers == (None,)
    assert MoEConfig.model_validate(yaml.safe_load(lending)["moe"]).lending == LendingConfig()


def test_the_page_of_objectives_has_every_kind_and_all_of_its_settings() -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    run_config.parse(
        {**yaml.safe_load(blocks("yaml")[0]), **yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])}
    )
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", page, re.MULTILINE))
    assert rows.keys() == kinds.OBJECTIVES.builtin.keys()
    of_all = {"kind", "weight"}
    for kind, row in rows.items():
        row += rows["contrastive"] * ("as `contrastive`" in row)
        names = kinds.OBJECTIVES.load(kind).Settings.model_fields.keys() - of_all
        assert [name for name in sorted(names) if f"`{name}`" not in row] == []


def test_the_manifest_of_the_tour_is_a_valid_manifest(tmp_path: Path) -> None:
    (block,) = blocks("json")
    rows = [json.loads(line) for line in block.splitlines()]
    for row in rows:
        for name in ("image", "audio"):
            if row.get(name):
                (tmp_path / row[name]).touch()
    (tmp_path / "manifest.jsonl").write_text(block)
    assert [row.key for row in read_manifest(tmp_path / "manifest.jsonl")] == [row["key"] for row in rows]


def test_every_key_of_reliability_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    keys = page.partition("## Keys")[2]
    for model in (CheckpointConfig, FaultsConfig, LossScaleConfig):
        for name, field in model.model_fields.items():
            (row,) = [line for line in keys.splitlines() if re.search(rf"[`.]{name}`", line.split(" | ")[0])]
            shown = str(field.default).lower().removesuffix(".0")
            assert re.search(rf"\b{re.escape(shown)}\b", row.split(" | ")[1]), (name, shown, row)


def test_every_file_that_it_names_is_there() -> None:
    root = Path(__file__).parents[1]
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert linked
    assert [path for path in linked if not (root / path).exists()] == []
