"""Exports are not trusted: errors name what is wrong, and nothing is written or run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.cli import app
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.export import layout, read
from mmmoe_pretrain.export.read import import_run, load_export, stored_as
from mmmoe_pretrain.export.write import export_run
from mmmoe_pretrain.modalities import Tokenizer
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.export.support import make_run
from tests.frozen import baseline
from tests.support import objectives, write_tokenizer

UP = "mmmoe.trunk.blocks.1.ffn.experts.up"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    root = tmp_path_factory.mktemp("import")
    config, _ = make_run(root, tiny_data)
    export_run(config.run_dir, root / "exported")
    return root / "exported"


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Exploding()))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / layout.CONFIG).unlink(), "config.json is missing"),
    "no index": (lambda f: (f / layout.INDEX).unlink(), "index.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no tokenizer": (lambda f: (f / layout.TOKENIZER).unlink(), "no tokenizer"),
    "no JSON": (lambda f: (f / layout.CONFIG).write_text("{"), "is not JSON"),
    "deep JSON": (lambda f: (f / layout.CONFIG).write_text("[" * 100_000), "is not JSON"),
    "a list": (lambda f: (f / layout.CONFIG).write_text("[]"), "not a JSON object"),
    "another model": (edit(layout.CONFIG, lambda v: v.update(model_type="bert")), "model_type 'bert'"),
    "a later format": (edit(layout.CONFIG, lambda v: v.update(format_version=3)), "format_version 3"),
    "a variable": (
        edit(layout.CONFIG, lambda v: v["config"]["data"]["train"][0].update(path="$HOME/train")),
        r"holds \$HOME",
    ),
    "a variable of an objective's file": (
        edit(layout.CONFIG, lambda v: v["config"]["objectives"].update(
            words={"kind": "semantic_anchors", "of": "image", "text": "text", "size": 8, "vectors": "$HOME/w.npz"})),
        r"holds \$HOME",
    ),
    "a variable of a modality's file": (
        edit(layout.CONFIG, lambda v: v["config"]["modalities"].update(
            picture={"kind": "image_codes", "tokenizer": "$HOME/c.npz", "codes": 15, "max_tokens": 16})),
        r"holds \$HOME",
    ),
    "a variable of a judge": (
        edit(layout.CONFIG, lambda v: v["config"]["evaluate"].update(generate={"captioning": {"judge": "$HOME"}})),
        r"holds \$HOME",
    ),
    "files that are no section": (edit(layout.CONFIG, lambda v: v.update(files=[])), "files is \\[\\]"),
    "a file elsewhere": (
        edit(layout.CONFIG, lambda v: v.update(files={"modalities.text.field": "../x.npz"})), "plain name"),
    "a file of no setting": (
        edit(layout.CONFIG, lambda v: v.update(files={"modalities.text.tokenizer": "x.npz"})), "no setting"),
    "no step": (edit(layout.CONFIG, lambda v: v.pop("step")), "step is None"),
    "an unknown key": (edit(layout.CONFIG, lambda v: v["config"].update(wings=2)), "unknown key 'wings'"),
    "a section of the wrong type": (edit(layout.CONFIG, lambda v: v["config"].update(data=3)), "config.data is 3"),
    "more blocks than tensors": (
        edit(layout.CONFIG, lambda v: v["config"]["model"].update(num_layers=9999)), "num_layers is 9999"),
    "more experts than numbers": (
        edit(layout.CONFIG, lambda v: v["config"]["moe"].update(num_experts=10**9)), "num_experts is 1000000000"),
    "another model than the files'": (
        edit(layout.CONFIG, lambda v: v["config"]["model"].update(hidden_size=32)), r"shape \(.*, and the config's"),
    "another block's weights": (
        edit(layout.CONFIG, lambda v: v["config"]["model"].update(num_layers=3)), "missing 6"),
    "another vocabulary": (edit(layout.CONFIG, lambda v: v.update(vocab_size=47)), "vocabulary size"),
    "another tokenizer": (edit(layout.CONFIG, lambda v: v.update(tokenizer_fingerprint="0")), "fingerprint"),
    "a tokenizer elsewhere": (edit(layout.CONFIG, lambda v: v.update(tokenizer="../tokens.model")), "plain name"),
    "weights elsewhere": (
        edit(layout.INDEX, lambda v: v["weight_map"].update({UP: "/etc/passwd"})), "plain name"),
    "no map": (edit(layout.INDEX, lambda v: v.update(weight_map=[])), "no weight_map"),
    "a name less in the index": (edit(layout.INDEX, lambda v: v["weight_map"].pop(UP)), f"unknown 1 .*{UP}"),
    "a tensor less": (weights(lambda t: t.pop(UP)), f"missing 1 .*{UP}"),
    "another shape": (weights(lambda t: t.update({UP: t[UP][:2].clone()})), rf"{UP} has shape \(2, 16, 16\)"),
    "another type": (weights(lambda t: t.update({UP: t[UP].to(torch.int32)})), f"{UP} is of type I32"),
    "a file cut short": (cut, "is damaged, or no safetensors file"),
    "a pickle": (with_pickle, "is damaged, or no safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export_is_refused_with_the_reason(
    name: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGES[name]
    folder = shutil.copytree(exported, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        import_run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_export_of_format_version_1_computes_what_it_did_then(tmp_path: Path, tiny_data: Path) -> None:
    """The record of ``tests/frozen`` has the names, shapes and losses of that time."""
    record = baseline.recorded()
    folder, fingerprint = tmp_path / "old", Tokenizer(tiny_data / "tokens.model").fingerprint
    folder.mkdir()
    shutil.copyfile(tiny_data / "tokens.model", folder / layout.TOKENIZER)
    held = {name.removeprefix("weights/"): torch.from_numpy(array) for name, array in record.items()
            if name.startswith("weights/")}  # fmt: skip
    safetensors.torch.save_file(held, folder / "model.safetensors")
    described = {"model_type": "mmmoe", "format_version": 1, "step": 3, "vocab_size": 48,
                 "tokenizer": layout.TOKENIZER, "tokenizer_fingerprint": fingerprint,
                 "config": json.loads(str(record["config"]))}  # fmt: skip
    (folder / layout.CONFIG).write_text(json.dumps(described))
    (folder / layout.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(held, "model.safetensors")}))
    import_run(folder, tmp_path / "run")
    config = run_config.load(tmp_path / "run" / "config.yaml")
    assert config.model.vocab_size == 48
    checkpoint = store.find_latest(config.checkpoint_root)
    assert checkpoint is not None
    model = PretrainingModel(config)
    store.load_weights(checkpoint, {**dict(model.named_parameters()), **persistent_buffers(model)})
    losses, _ = baseline.compute(model, baseline.pack_samples(config, baseline.samples_on_record(record, 0), 0), 0)
    expected = json.loads(str(record["losses/0"]))
    for name, value in expected.items():  # the sums of another processor differ in the last digits
        assert losses[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert load_export(folder)[1].modalities == config.modalities


def test_rows_of_version_1_are_found_by_the_names_of_then() -> None:
    router = "mmmoe.trunk.blocks.1.ffn.router."
    assert stored_as("mmmoe.modality_embedding.audio") == ("mmmoe.modality_embedding.weight", 1)
    assert stored_as(f"{router}bias.text") == (f"{router}bias", 2)
    assert stored_as(f"{router}bias.all") == (f"{router}bias", 0)
    assert stored_as(f"{router}task_embedding.captioning") == (f"{router}task_embedding", 1)
    assert stored_as("tasks.contrastive.log_scale.image-text") == ("contrastive.log_scale.image-text", None)
    assert stored_as(f"{router}weight") == (f"{router}weight", None)


def test_a_huge_config_is_not_read_and_a_run_not_written_over(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="exists"):
        import_run(exported, tmp_path)
    monkeypatch.setattr(read, "MAX_JSON", 100)
    with pytest.raises(ValueError, match="at most 100 are read"):
        import_run(exported, tmp_path / "out")


def test_settings_of_another_machine_are_not_imported(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    foreign = {
        "parallel": {"engine": "deepspeed", "deepspeed": {"nebula": {"persistent_storage_path": "/theirs"}},
                     "tensor_parallel_size": 8},
        "checkpoint": {"folder": "s3://theirs", "every": 7},
        "faults": {"replica_check_every": 3},
    }  # fmt: skip
    edit(layout.CONFIG, lambda v: v["config"].update(foreign))(folder)
    import_run(folder, tmp_path / "out", ["checkpoint.every=9"])
    config = run_config.load(tmp_path / "out" / "config.yaml")
    plain = RunConfig.model_fields
    for section in ("parallel", "faults"):
        assert getattr(config, section) == plain[section].get_default(call_default_factory=True), section
    assert (config.checkpoint.folder, config.checkpoint.every) == (None, 9)


def test_a_run_is_imported_to_where_its_overrides_say(exported: Path, tmp_path: Path) -> None:
    folder = f"checkpoint.folder={tmp_path / 'elsewhere'}"
    import_run(exported, tmp_path / "out", [folder])
    assert store.find_latest(run_config.load(tmp_path / "out" / "config.yaml").checkpoint_root) is not None
    assert load_model(tmp_path / "out")[2] == 0
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="has the checkpoints of another run; choose another name by --out"):
        import_run(exported, tmp_path / "out", [folder])
    other = write_tokenizer(tmp_path / "other.model", backwards=True)
    with pytest.raises(ValueError, match=f"{other} has fingerprint"):
        import_run(exported, tmp_path / "out", [f"data.tokenizer={other}"])


def test_a_memory_queue_is_not_exported_and_empty_after_an_import(tmp_path: Path, tiny_data: Path) -> None:
    """Its group ids are hashes of 64 bits, which fp32 does not hold."""
    config, _ = make_run(tmp_path, tiny_data, objectives=objectives({"queue_size": 16}))
    export_run(config.run_dir, tmp_path / "exported")
    assert "queue" not in (tmp_path / "exported" / layout.INDEX).read_text()
    import_run(tmp_path / "exported", tmp_path / "imported", overrides=[f"data.train.0.path={tiny_data / 'train'}"])
    (first,) = store.checkpoints(str(tmp_path / "imported" / "checkpoints"))
    model, state = PretrainingModel(config), store.read_state(first)
    assert {f"model/{name}" for name in model.state_dict()} == {key for key in state if key.startswith("model/")}
    for name, buffer in persistent_buffers(model.tasks).items():
        found = state[f"model/tasks.{name}"]
        assert (found.shape, found.dtype, bool(found.any())) == (buffer.shape, buffer.dtype, False), name


def test_the_commands_are_there(exported: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    made = runner.invoke(app, ["import", str(exported), "--out", str(tmp_path / "run"), "train.steps=3"])
    assert made.exit_code == 0, made.output
    assert "mmmoe train" in made.output
    written = runner.invoke(
        app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--license", "mit"]
    )
    assert written.exit_code == 0, written.output
    assert "license: mit" in (tmp_path / "back" / layout.CARD).read_text()
