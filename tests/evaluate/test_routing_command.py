"""The whole routing report: of a run that was trained, compared with routing computed again from the router's
weights; and of runs that have less to show."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.checkpoint.model import SavedRun
from mmmoe_pretrain.checkpoint.store import Checkpoint
from mmmoe_pretrain.cli import app
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings, iterate_eval
from mmmoe_pretrain.data.pack import origins
from mmmoe_pretrain.evaluate import rows
from mmmoe_pretrain.evaluate.routing import command, page
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.tokens import token_info
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import things, tiny_config, write_shards

TOP = 4
MODALITIES = ("image", "audio", "text")  # of tiny_config
TASKS = {"contrastive", "captioning"}


def held_out(folder: Path, lacking: tuple[str, ...] = ()) -> Path:
    """Things with names that are not trained on."""
    return write_shards(folder, [{**row, "name": f"number {row['name']}"} for row in things(12)], lacking=lacking)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps of a model whose two blocks have four experts, two a token."""
    root = tmp_path_factory.mktemp("routing")
    config = tiny_config(
        root,
        data={"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
              "num_workers": 0},
        moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1},
        train={"steps": 6, "global_batch_size": 8, "log_every": 1},
        evaluate={"test": [str(held_out(root / "test"))]},
    )  # fmt: skip
    run_ranks(1, train, config)
    return config


@pytest.fixture(scope="module")
def report(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in batches of five, so that top-activating tokens are found across batches."""
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BATCH_SIZE", 5)
        result = CliRunner().invoke(app, ["routing", str(trained.run_dir), "--out", str(out), "--top", str(TOP)])
    assert result.exit_code == 0, result.output
    assert f"wrote {out / 'routing.html'}, {out / 'routing.json'}" in result.output.replace("\n", "")
    return out


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "routing.json").read_text())


def modalities_of(config: RunConfig) -> Modalities:
    return build_modalities(config.modalities, config.data.tokenizer)


def every_token(config: RunConfig) -> list[dict[tuple[str, str, int, str], tuple[np.ndarray, Any]]]:
    """By layer: (modality, sample, token, task) -> (router's probabilities [E], content), from the
    router's input and weight alone; ``origins`` is compared with a walk by hand in test_top_tokens.py."""
    model, _, _ = load_model(config.run_dir)
    inputs: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    modalities = modalities_of(config)
    batch, samples = next(iterate_eval(config.evaluate.test, config, modalities, 64))
    with torch.no_grad():
        model(batch)
        p_LnE = [(x_nD @ router.weight.t()).softmax(-1).numpy() for x_nD, router in zip(inputs, routers, strict=True)]
    found = origins(samples, eval_settings(config, modalities), range(len(samples)))
    places = zip(found.sample_n.tolist(), found.item_n.tolist(), found.token_n.tolist(), strict=True)
    tasks = [config.stream_names.tasks[x] for x in token_info(batch, config.stream_names).task_ids_n]
    tokens = [(samples[b], samples[b].items[i], token) for b, i, token in places]
    names = [(item.modality, sample.meta.key, token, task)
             for (sample, item, token), task in zip(tokens, tasks, strict=True)]  # fmt: skip
    what = [item.raw or item.value.tobytes() for _, item, _ in tokens]
    return [dict(zip(names, zip(p_nE, what, strict=True), strict=True)) for p_nE in p_LnE]


def test_listed_tokens_are_the_most_probable_that_the_expert_served(trained: RunConfig, report: Path) -> None:
    """Tolerance: fp32 through two blocks, in batches of another size."""
    checked = 0
    for layer, tokens in zip(numbers(report)["layers"], every_token(trained), strict=True):
        for expert, found in enumerate(layer["top_tokens"]):
            for modality, listed in found.items():
                served = [
                    (float(np.log(p_E[expert])), what)
                    for name, (p_E, what) in tokens.items()
                    if name[0] == modality and expert in np.argsort(-p_E)[:2]
                ]
                best: dict[Any, float] = {}
                for log_p, what in served:
                    best[what] = max(log_p, best.get(what, -np.inf))
                expected = sorted(best.values(), reverse=True)[:TOP]
                names = [(modality, t["sample"], t["token"], t["task"]) for t in listed]
                own = [float(np.log(tokens[name][0][expert])) for name in names]
                np.testing.assert_allclose([t["log_probability"] for t in listed], own, atol=1e-4)
                if len(best) >= TOP:  # enough distinct contents, and so no second token of any
                    np.testing.assert_allclose(own, expected, atol=1e-4)
                    assert len({tokens[name][1] for name in names}) == TOP
                    checked += 1
    assert checked > 12, "too few experts and modalities with enough tokens to check the order"


def test_what_is_lost_without_each_expert_and_another_run_are_in_the_page_if_asked_for(
    trained: RunConfig, tmp_path: Path
) -> None:
    own = str(trained.run_dir)
    asked = ["routing", own, "--out", str(tmp_path), "--ablate", "8", "--beside", own]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    found = numbers(tmp_path)
    assert [layer["beside"] for layer in found["layers"]] == [dict.fromkeys(MODALITIES, 1.0)] * 2
    passes = 1
    for layer in found["layers"]:
        ablation = layer["ablation"]
        assert set(ablation["loss"]) >= {"captioning"} and len(ablation["without"]) == layer["experts"] == 4
        for expert, rises in enumerate(ablation["without"]):
            reached = {name for name, share in layer["share"].items() if share[expert] > 0}
            assert set(rises) == (reached | {"all"} if reached else set())
            assert all(set(losses) == set(ablation["loss"]) for losses in rises.values())
            passes += len(rises)
    assert any(rises["all"]["captioning"] for layer in found["layers"] for rises in layer["ablation"]["without"])
    assert f"{passes} passes over 1 batches" in result.output
    html = (tmp_path / "routing.html").read_text()
    assert html.count("What is lost without each expert") == 2
    assert any("masked one by one" in note for note in found["notes"])
    refused = CliRunner().invoke(app, ["routing", str(trained.run_dir), "--out", str(tmp_path), "--ablate", "0"])
    assert isinstance(refused.exception, ValueError) and "--ablate 0" in str(refused.exception)


def test_concepts_and_consistency_are_in_the_report(report: Path) -> None:
    found = numbers(report)
    for layer in found["layers"]:
        assert len(layer["concepts"]) == 4
        assert set(layer["consistency"]) == {"views", "paraphrases"}
        assert set(layer["consistency"]["views"]) == set(MODALITIES)
        for its in layer["consistency"]["views"].values():
            assert its["pairs"] == found["samples"] and 0 <= its["divergence"] <= 1 and 0 <= its["same_expert"] <= 1
    html = (report / "routing.html").read_text()
    assert html.count("Consistency of routing in layer") == 2


def test_tokens_are_given_in_pixels_seconds_and_pieces(report: Path) -> None:
    """Images of 16 pixels are 2 x 2 patches of 8; a token of audio is 8 frames of 10 ms."""
    boxes = {0: [0, 0, 8, 8], 1: [8, 0, 16, 8], 2: [0, 8, 8, 16], 3: [8, 8, 16, 16]}
    seen = set()
    for layer in numbers(report)["layers"]:
        for found in layer["top_tokens"]:
            for token in found.get("image", []):
                assert token["position"]["pixels"] == boxes[token["token"]]
                assert token["box"] == [side / 16 for side in boxes[token["token"]]]
            for token in found.get("audio", []):
                start, end = token["position"]["seconds"]
                assert (start, end) == pytest.approx((0.08 * token["token"], 0.08 * (token["token"] + 1)))
            for token in found.get("text", []):
                piece, text = token["position"]["piece"], token["position"]["of"]
                assert piece in ("⟨begin⟩", "⟨end⟩", "␣") or piece in text
                assert token["excerpt"][1] == piece
            seen |= found.keys()
    assert seen == set(MODALITIES)


def test_numbers_of_the_layers_are_those_of_the_tokens(trained: RunConfig, report: Path) -> None:
    for layer, tokens in zip(numbers(report)["layers"], every_token(trained), strict=True):
        for modality in MODALITIES:
            p_nE = np.stack([p_E for name, (p_E, _) in tokens.items() if name[0] == modality])
            chosen_nK = np.argsort(-p_nE, axis=1)[:, :2]
            counts_E = np.bincount(chosen_nK.reshape(-1), minlength=4)
            # One token of a close call may fall the other way in a batch of another size.
            np.testing.assert_allclose(
                layer["share"][modality], counts_E / counts_E.sum(), atol=1.01 / counts_E.sum()
            )
            np.testing.assert_allclose(layer["mean_probability"][modality], p_nE.mean(0), atol=1e-4)
            assert layer["tokens"][modality] == len(p_nE)
            pairs = Counter(tuple(sorted(pair)) for pair in chosen_nK.tolist())
            for a, b, share in layer["pairs"][modality]:
                assert share == pytest.approx(pairs[a, b] / len(p_nE), abs=1.01 / len(p_nE))
        assert set(layer["specialisation_by_task"]) == TASKS


def test_the_page_is_that_of_the_json(report: Path) -> None:
    assert sorted(path.name for path in report.iterdir()) == ["routing.html", "routing.json"]
    text = (report / "routing.html").read_text()
    assert text == page.render(numbers(report))
    for layer in (0, 1):
        assert f'id="load-{layer}"' in text and f'id="slider-{layer}"' in text
    assert numbers(report)["left_out"] == {"layers": 0, "tokens": 0, "thumbnails": 0, "sounds": 0}


def test_history_is_that_of_the_log(trained: RunConfig, report: Path) -> None:
    records = [json.loads(line) for line in (trained.run_dir / "metrics.jsonl").read_text().splitlines()]
    for number, layer in enumerate(numbers(report)["history"]):
        assert layer["steps"] == layer["load_steps"] == [record["step"] for record in records]
        logged = [[record["routing"][number]["load"][m] for m in layer["modalities"]] for record in records]
        np.testing.assert_allclose(layer["load"], logged, rtol=1e-5)  # of six digits


def test_sounds_are_those_of_the_shards(report: Path) -> None:
    """A tone of the row's own pitch, a quarter of a second; each once, whatever the number of its tokens."""
    hertz = {row["key"]: row["hertz"] for row in things(12)}
    sounds = [its for its in numbers(report)["media"] if its["modality"] == "audio"]
    for its in sounds:
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(its["sound"]["uri"].partition(",")[2])))
        assert len(wave) / rate == its["sound"]["seconds"] == pytest.approx(0.25, abs=0.01)
        peak = np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)
        assert peak == pytest.approx(hertz[its["sample"]], abs=rate / len(wave)), "within one bin"
    assert sounds and len({its["sound"]["uri"] for its in sounds}) == len(sounds)
    assert all(its["sound"] is None for its in numbers(report)["media"] if its["modality"] == "image")


@pytest.mark.parametrize("command", ["evaluate", "routing"])
def test_a_gpu_that_is_asked_for_and_absent_is_an_error(command: str, trained: RunConfig, tmp_path: Path) -> None:
    arguments = [command, str(trained.run_dir), "--device", "cuda", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--device cuda: there is no GPU to use"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def random_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is an untrained model of ``config``."""
    monkeypatch.setattr(command, "open_run", lambda *_: SavedRun(config, Checkpoint("", "", 7), {}))
    monkeypatch.setattr(SavedRun, "model", lambda its: PretrainingModel(its.config).mmmoe.eval())


def test_a_report_of_less_replaces_the_first(
    trained: RunConfig, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One MoE layer, one expert a token, no audio and no log."""
    (tmp_path / "routing.html").write_bytes((report / "routing.html").read_bytes())
    moe = trained.moe.model_copy(update={"every": 2, "experts_per_token": 1})
    random_run(trained.model_copy(update={"moe": moe}), monkeypatch)
    silent = held_out(tmp_path / "silent", lacking=("audio",))
    command.write_report(tmp_path / "no run", [str(silent)], out=tmp_path)
    (layer,) = numbers(tmp_path)["layers"]
    assert set(layer["share"]) == {"image", "text"}
    assert not any("audio" in found for found in layer["top_tokens"])
    assert (layer["pairs"], numbers(tmp_path)["history"]) == ({"image": [], "text": []}, [])
    text = (tmp_path / "routing.html").read_text()
    assert 'id="load-0"' not in text and "has no two records" in text and "<audio" not in text


def test_experts_without_computation_are_named(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = trained.moe.model_copy(update={"num_experts": 128, "null_experts": 2, "experts_per_token": 8, "every": 2})
    random_run(trained.model_copy(update={"moe": moe}), monkeypatch)
    assert command.write_report(tmp_path, trained.evaluate.test, top=1) == tmp_path
    text = (tmp_path / "routing.html").read_text()
    assert "Experts without computation (<bdi>null</bdi>): 128, 129." in text
    assert text.count('<tr><th scope="row"><a href="#layer-1-expert-') > 64


def test_dense_runs_and_missing_shards_are_refused_with_a_remedy(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--top 0 would list nothing"):
        command.write_report(trained.run_dir, top=0)
    bare = trained.model_copy(update={"evaluate": trained.evaluate.model_copy(update={"test": ()})})
    random_run(bare, monkeypatch)
    with pytest.raises(ValueError, match="names no held-out shards; give --test FOLDER"):
        command.write_report(tmp_path)
    dense = trained.model_copy(
        update={"moe": trained.moe.model_copy(update={"num_experts": 1, "experts_per_token": 1})}
    )
    random_run(dense, monkeypatch)
    with pytest.raises(ValueError, match=r"is a dense model .* no routing to show"):
        command.write_report(tmp_path)
    assert not list(tmp_path.iterdir())
