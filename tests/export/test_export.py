"""What an export holds, that another program can read it, and that it comes back as it was."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.checkpoint.model import read_config
from mmmoe_pretrain.checkpoint.state import model_key, split_key
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep.codes import first_weights
from mmmoe_pretrain.export import layout
from mmmoe_pretrain.export.card import _licences, _training, facts_of
from mmmoe_pretrain.export.layout import Weight, in_files, parameter_counts, weights_of
from mmmoe_pretrain.export.read import import_run, load_export
from mmmoe_pretrain.export.write import export_run
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.modalities.fsq import Codebook, Levels, Network
from mmmoe_pretrain.modalities.image_codes import ImageCodes
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.export.support import State, make_run, write_run
from tests.support import png_of, random_batch, things, tiny_config, write_tar

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"
MOE = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8, "bias_balancing": {"rate": 0.001}}
LOSSES = {"total": 2.5, "captioning": 0.25}
Made = tuple[Path, dict[int, State]]  # the folder of a run, and the state of each of its checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Made:
    root = tmp_path_factory.mktemp("export")
    config, states = make_run(root, tiny_data, steps=(5, 10), moe=MOE)
    lines = [{"step": 8, "losses": LOSSES}, {"step": 11, "losses": {"total": 99.0}}]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config.run_dir, states


@pytest.fixture(scope="module")
def exported(made: Made) -> Path:
    """In several files."""
    out = made[0].parent / "exported"
    export_run(made[0], out, file_bytes=20_000)
    return out


def by_name(state: State) -> dict[str, torch.Tensor]:
    """The weights, buffers included."""
    return {split_key(key)[0]: tensor for key, tensor in state.items() if split_key(key)[1] is None}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    places = json.loads((folder / layout.INDEX).read_text())["weight_map"]
    files = {file: safetensors.torch.load_file(folder / file) for file in set(places.values())}
    return {name: files[file][name] for name, file in places.items()}


def test_files_hold_every_weight_of_the_checkpoint_bit_for_bit(made: Made, exported: Path) -> None:
    found, expected = read_all(exported), by_name(made[1][10])
    assert found.keys() == expected.keys()
    assert any(name.endswith("router.bias.all") for name in found)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_an_index_of_several_files_is_that_of_hugging_face(exported: Path) -> None:
    index = json.loads((exported / layout.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    held = {file: safetensors.torch.load_file(exported / file) for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]


def test_files_are_filled_up_to_their_size_and_a_larger_tensor_stands_alone() -> None:
    def weight(name: str, numel: int) -> Weight:
        return Weight(name, (numel,), torch.float32, True)

    files = in_files([weight("a", 1), weight("b", 1), weight("c", 5), weight("d", 2), weight("e", 1)], file_bytes=8)
    assert [[w.name for w in held] for held in files.values()] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(in_files([weight("a", 1)])) == ["model.safetensors"]


def test_bf16_is_of_what_training_computes_in_bf16(made: Made, tmp_path: Path) -> None:
    run, states = made
    export_run(run, tmp_path / "half", step=5, dtype="bf16")
    found = read_all(tmp_path / "half")
    for name in ("mmmoe.trunk.blocks.1.ffn.experts.up", "mmmoe.language_head.weight"):
        assert torch.equal(found[name], states[5][model_key(name)].bfloat16()), name
    for name in (
        "mmmoe.trunk.blocks.1.ffn.router.weight",
        "mmmoe.trunk.norm.weight",
        "mmmoe.joint_heads.text.weight",
    ):
        assert torch.equal(found[name], states[5][model_key(name)]), name


def test_parameters_are_counted_as_by_hand(tmp_path: Path) -> None:
    """One MoE layer, of 4 experts a token takes 2; up is [16, 16] and down [16, 8] with SwiGLU."""
    config = tiny_config(tmp_path, moe={"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8})
    weights = weights_of(config)
    total, active = parameter_counts(config, weights)
    one_expert = 2 * 8 * 16 + 8 * 16
    assert total == sum(w.numel for w in weights)  # no buffers here
    assert total - active == 2 * one_expert


def test_config_and_card_describe_the_run(made: Made, exported: Path) -> None:
    described = json.loads((exported / layout.CONFIG).read_text())
    assert (described["step"], described["vocab_size"], described["format_version"]) == (10, 48, layout.VERSION)
    assert described["config"] == yaml.safe_load((made[0] / "config.yaml").read_text())
    card = (exported / layout.CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "mmmoe"
    assert front["license"] == "unknown"
    assert {"mixture-of-experts", "image", "audio", "text"} <= set(front["tags"])
    total, active = described["parameters"]["total"], described["parameters"]["active"]
    for fact in (f"{total:,} parameters", f"{active:,}", "logged at step 8", "| captioning | 0.25 |",
                 "block 1: 4 experts of hidden size 8, 2 a token", "no evaluation", "To be filled in",
                 "- loss contrastive/image-audio (kind contrastive), weight 0.5",
                 "- loss captioning (kind next_token), weight 0.5",
                 "- image (kind image), at most 4 tokens: aspect square, fit letterbox, size 16",
                     "48 pieces"):  # fmt: skip
        assert fact in card, fact
    assert "99" not in card  # a later step's loss


def test_a_run_without_text_is_exported_and_read_without_a_tokenizer(tmp_path: Path) -> None:
    sensors = {name: {"kind": "series", "channels": 2, "patch": 4} for name in ("left", "right")}
    config = tiny_config(tmp_path, modalities=sensors, data={"train": [{"path": str(tmp_path / "gone")}]},
                         objectives={"sides": {"kind": "contrastive", "pairs": {"left-right": 1.0}}})  # fmt: skip
    write_run(config, Modalities({}), (10,))
    export_run(config.run_dir, tmp_path / "out")
    assert not (tmp_path / "out" / layout.TOKENIZER).exists()
    card = (tmp_path / "out" / layout.CARD).read_text()
    assert "over left and right tokens" in card and "sentencepiece" not in card
    import_run(tmp_path / "out", tmp_path / "again")
    (before, _, _), (after, _, _), (read, _, modalities) = (
        load_model(config.run_dir), load_model(tmp_path / "again"), load_export(tmp_path / "out"),
    )  # fmt: skip
    assert (modalities.vocab_size, list(modalities)) == (0, ["left", "right"])
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name
        assert torch.equal(parameter, read.get_parameter(name)), name


def test_a_tokenizer_of_codes_is_exported_and_imported(tmp_path: Path) -> None:
    """The original may be gone; another file in its place is refused: in the run, in the export, by an override."""
    network = Network(3, (4, 4), 8, Levels((5, 3)))
    for name, seed in (("c.npz", 1), ("other.npz", 2)):
        weights = {name: x.detach().numpy() for name, x in first_weights(network, seed, torch.device("cpu")).items()}
        media = {"kind": "image", "size": 16, "patch": 4, "augment": False}
        Codebook(network, weights, media, {}).write(tmp_path / name)
    picture = {"kind": "image_codes", "tokenizer": str(tmp_path / "c.npz"), "codes": 15, "max_tokens": 16}
    drawing = {"drawing": {"kind": "next_token", "parts": ["picture"]}}
    config = tiny_config(tmp_path, modalities={"picture": picture}, objectives=drawing).with_files()
    write_run(config, Modalities({}), (10,))
    export_run(config.run_dir, tmp_path / "out")
    codes = (tmp_path / "c.npz").read_bytes()
    shutil.copyfile(tmp_path / "other.npz", tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"has fingerprint .* the run was made with"):
        export_run(config.run_dir, tmp_path / "another")
    (tmp_path / "c.npz").unlink()

    import_run(tmp_path / "out", tmp_path / "again")
    imported = read_config(tmp_path / "again").modalities["picture"]
    assert imported.file == str(tmp_path / "again" / "modalities.picture.npz")
    assert (tmp_path / "again" / "modalities.picture.npz").read_bytes() == codes
    _, read, modalities = load_export(tmp_path / "out")
    assert read.modalities["picture"].file == str(tmp_path / "out" / "modalities.picture.npz")
    image = png_of(things(1)[0])
    np.testing.assert_array_equal(modalities["picture"].decode(image), ImageCodes("picture", imported).decode(image))

    with pytest.raises(ValueError, match=r"has fingerprint .* the run was made with"):
        import_run(tmp_path / "out", tmp_path / "x", [f"modalities.picture.tokenizer={tmp_path / 'other.npz'}"])
    shutil.copyfile(tmp_path / "other.npz", tmp_path / "out" / "modalities.picture.npz")
    with pytest.raises(ValueError, match=r"has fingerprint .* the run was made with"):
        import_run(tmp_path / "out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_card_counts_licences_as_the_samples_state_them(tmp_path: Path, tiny_data: Path) -> None:
    """Four rows under two spellings of the field, one of a broken JSON, and a second folder that is not there."""
    rows = [{"licence": "MIT", "source": "b"}, {"licence": "MIT", "source": "a"}, {"license": "CC-BY-4.0"}, {}]
    members = [*((f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)), ("4.json", b"{")]
    write_tar(tmp_path / "shards" / "0.tar", members)
    data = {"train": [{"path": str(tmp_path / "shards")}, {"path": "gone", "weight": 3}],
            "tokenizer": str(tiny_data / "tokens.model")}  # fmt: skip
    facts = facts_of(tmp_path, tiny_config(tmp_path, data=data), {"step": 1}, "apache-2.0")
    lines = "\n".join([*_training(facts), *_licences(facts)]).splitlines()
    for line in (f"| {tmp_path / 'shards'} | 5 | 25.0% |", "| gone | - | 75.0% |", "From the JSON of 5 samples:",
                 "| MIT | 2 | a, b |", "| CC-BY-4.0 | 1 |  |", "| not stated | 2 |  |",
                 "Of the samples that state none: **To be filled in.**"):  # fmt: skip
        assert line in lines, line
    assert any(line.startswith("Without gone, which could not be read") for line in lines)


def test_the_example_compares_an_image_and_texts_as_the_run_s_own_model_does(
    made: Made,
    exported: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reference goes through shards and the evaluation's pass over them."""
    model, config, _ = load_model(made[0])
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    batch, samples = next(iterate_eval([tiny_data / "train"], config, modalities, 3))
    with torch.inference_mode():
        features = model(batch)[0].features
    (tmp_path / "picture.png").write_bytes(open_indexed(tiny_data / "train").read(0).members["png"])
    texts = [item.raw for sample in samples for item in sample.items if item.modality == "text"]
    assert len(set(texts)) == 3
    monkeypatch.setattr(sys, "argv", ["embed.py", str(exported), str(tmp_path / "picture.png"), *texts])
    runpy.run_path(str(EXAMPLE))
    said = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [text for _, text in said] == texts
    # printed with four digits
    np.testing.assert_allclose(
        [float(value) for value, _ in said], features["text"] @ features["image"][0], atol=1e-4
    )
    assert len(EXAMPLE.read_text().splitlines()) <= 25


def test_the_card_shows_an_evaluation_of_this_step_alone(made: Made, tmp_path: Path) -> None:
    row = {"metric": "image_to_text_r1", "value": 0.125, "interval": [0.1, 0.15], "chance": 0.02, "majority": None,
           "n": 64, "candidates": 64, "unit": "share"}  # fmt: skip
    report = {"run": "tiny", "step": 10, "date": "2026-01-02", "results": [row], "routing": {}, "notes": ["a note"]}
    path = made[0] / "report.json"
    path.write_text(json.dumps(report))
    try:
        export_run(made[0], tmp_path / "ten")
        export_run(made[0], tmp_path / "five", step=5)
    finally:
        path.unlink()
    card = (tmp_path / "ten" / layout.CARD).read_text()
    assert "| image_to_text_r1 | share | 0.125 [0.1, 0.15] | 0.02 | 64 |" in card
    assert "a note" in card
    assert "evaluation is of step 10, not of these weights" in (tmp_path / "five" / layout.CARD).read_text()


def test_a_damaged_report_is_none_and_a_damaged_log_is_named(made: Made, tmp_path: Path) -> None:
    report, log = made[0] / "report.json", made[0] / "metrics.jsonl"
    before = log.read_bytes()
    try:
        log.write_text('{"step": 5, "losses": {"total": 1.25}}\n{"step": 10, "los')
        report.write_text('{"run": "tiny", "st')
        export_run(made[0], tmp_path / "out")
        card = (tmp_path / "out" / layout.CARD).read_text()
        assert "The run's report.json is damaged" in card
        assert "| total | 1.25 |" in card
        for line in ("no JSON", "[1]", '{"step": 5}'):
            log.write_text(f"{line}\n")
            with pytest.raises(ValueError, match=f"^{log}, line 1, is not "):
                export_run(made[0], tmp_path / "again")
    finally:
        report.unlink()
        log.write_bytes(before)


def test_only_an_export_is_replaced_and_only_with_overwrite(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(made[0], out, step=5)
    with pytest.raises(ValueError, match="--overwrite"):
        export_run(made[0], out)
    export_run(made[0], out, overwrite=True)
    assert json.loads((out / layout.CONFIG).read_text())["step"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is not an export"):
        export_run(made[0], tmp_path / "mine", overwrite=True)


def test_a_refused_export_says_why_and_leaves_nothing(made: Made, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no finished checkpoint of step 7 .* \[5, 10\]"):
        export_run(made[0], tmp_path / "out", step=7)
    with pytest.raises(ValueError, match=r"moe.num_experts=2: an export has the settings of its training"):
        export_run(made[0], tmp_path / "out", overrides=["moe.num_experts=2"])
    with pytest.raises(ValueError, match="no run in"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="--dtype fp8"):
        export_run(made[0], tmp_path / "out", dtype="fp8")
    config, _ = make_run(tmp_path, tiny_data)
    (tmp_path / "other.model").write_bytes((tiny_data / "tokens.model").read_bytes() + b"\0")
    text = (config.run_dir / "config.yaml").read_text()
    (config.run_dir / "config.yaml").write_text(text.replace(config.data.tokenizer, str(tmp_path / "other.model")))
    with pytest.raises(ValueError, match="tokenizer"):
        export_run(config.run_dir, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, tiny_data: Path) -> None:
    config, _ = make_run(tmp_path, tiny_data)
    (file,) = (config.run_dir / "checkpoints").glob("step_*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=file.name):
        export_run(config.run_dir, tmp_path / "out")


def test_an_import_has_the_weights_at_step_zero_and_computes_the_same(
    made: Made, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    import_run(exported, out, ["evaluate.prompt='a {}'"])
    checkpoint = store.find_latest(out / "checkpoints")
    assert checkpoint is not None
    found, expected = store.read_state(checkpoint), made[1][10]
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if split_key(key)[1] is None:
            assert torch.equal(tensor, expected[key]), key
        else:
            assert not tensor.any(), key
    old, config, _ = load_model(made[0])
    new, settings, step = load_model(out)
    batch = random_batch(config, ["iat", "it", "at", "ia"] * 3)
    with torch.inference_mode():
        (before, _), (after, _) = old(batch), new(batch)
    for modality, features in before.features.items():
        assert torch.equal(features, after.features[modality])
    assert torch.equal(before.token_nll["captioning"], after.token_nll["captioning"])
    assert (step, settings.name, settings.evaluate.prompt) == (0, "again", "a {}")
    assert Path(settings.data.tokenizer or "") == out / layout.TOKENIZER


def test_an_import_can_be_trained(made: Made, exported: Path, tmp_path: Path) -> None:
    """Step 1 moves the imported weights by its small learning rate, not by a fresh start."""
    out = tmp_path / "again"
    import_run(exported, out, ["train.steps=2", "optimizer.learning_rate=1e-4", "checkpoint.every=1"])
    run_ranks(1, train, run_config.load(out / "config.yaml"))
    checkpoint = store.find_latest(out / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 2
    found = store.read_state(checkpoint)
    before = by_name(made[1][10])
    for name, weight in before.items():
        moved = (found[model_key(name)] - weight).abs().max()
        assert moved < 0.01, name  # two steps of Adam, and decay; the weights are of size 0.3
    assert not torch.equal(found[model_key("mmmoe.trunk.norm.weight")], before["mmmoe.trunk.norm.weight"])


RUNNER = """
import sys
sys.modules["mmmoe_pretrain"] = None  # an import of it fails
values = {}
exec(open("example.py").read(), values)
import numpy
numpy.savez("found.npz", experts=values["experts"].numpy(), y=values["y"].numpy(), ids=values["ids"].numpy())
assert not [name for name in sys.modules if name.startswith(("mmmoe_pretrain.", "megatron"))]
"""


def test_the_lines_in_the_docs_compute_what_the_package_computes(tmp_path: Path, tiny_data: Path) -> None:
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    config, _ = make_run(tmp_path, tiny_data, moe={"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8})
    export_run(config.run_dir, tmp_path / "export")
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "runner.py").write_text(RUNNER)
    result = subprocess.run(
        [sys.executable, "-I", "runner.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = np.load(tmp_path / "found.npz")
    model, _, _ = load_model(config.run_dir)
    experts, output = moe_layer_of(model, torch.from_numpy(found["ids"]))
    np.testing.assert_array_equal(found["experts"], experts)
    # fp32 sums in another order, of 16 and 8 products of size 0.1
    np.testing.assert_allclose(found["y"], output, rtol=1e-5, atol=1e-6)


def moe_layer_of(model: Any, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The package's first MoE layer on the embedded ids: the experts it chooses, and its output."""
    block = model.trunk.blocks["1"]
    tokens = TokenInfo.of_modalities(torch.full_like(ids, model.names.modalities.index("text")), model.names)
    with torch.inference_mode():
        rows = model.embedders["text"](ids, torch.arange(len(ids))) + model.modality_embedding["text"]
        _, h_nD = block.ffn_norm(rows)
        routing = block.ffn.router(h_nD, tokens)
        output, _ = block.ffn(h_nD, tokens)
    return routing.expert_ids_nK.numpy(), output.numpy()
