"""Scores of what is generated from latent numbers: on a random model whose decoders do not look at them, and on one
that generates the truth; and the page of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.distributions import Categorical, Normal

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import model_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.evaluate import latents_page, run
from mmmoe_pretrain.evaluate.latents_page import latents_command
from mmmoe_pretrain.evaluate.report import Report
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives.multimodal_vae import LatentModule
from tests.support import things, tiny_config, write_shards, write_tokenizer

TESTED = 7  # held-out rows, of which the last two have no audio
PARTS = ("image", "audio", "text")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("latents")
    rows = things(TESTED)
    write_shards(root / "test" / "whole", rows[:5])
    write_shards(root / "test" / "mute", rows[5:], lacking=("audio",))
    write_shards(root / "train", things(20)[8:])
    write_tokenizer(root / "tokens.model")
    vae = {"kind": "multimodal_vae", "modalities": list(PARTS), "latent_size": 3, "private": {"audio": 2}}
    return tiny_config(
        root,
        objectives={"latent": vae},
        evaluate={"test": [str(root / "test" / part) for part in ("whole", "mute")], "latents": {"draws": 3}},
    )


def with_weights(model: PretrainingModel, folder: Path) -> Any:
    """A stand-in for what loads the run in ``folder``, whose objectives have a checkpoint."""
    state = {model_key(f"tasks.{name}"): p.detach() for name, p in model.tasks.named_parameters()}
    store.write_state(folder / "checkpoints", 7, state, {})
    return lambda *_: (model.mmmoe.eval(), model.config, 7)


def random_model(config: RunConfig) -> PretrainingModel:
    model = PretrainingModel(config)
    torch.manual_seed(0)
    for parameter in model.mmmoe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def evaluated(folder: Path, model: PretrainingModel, overrides: tuple[str, ...] = ()) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", with_weights(model, folder))
        return run.evaluate(folder)


def scores(report: Report) -> dict[str, dict[str, Any]]:
    return {
        row["metric"].removeprefix("latent_"): row for row in report.results if row["metric"].startswith("latent")
    }


def test_decoders_that_ignore_latent_numbers_have_the_same_likelihood_given_anything(
    config: RunConfig, tmp_path: Path
) -> None:
    """It is that of a fixed distribution. The bounds are below the likelihood, here by the divergence."""
    model = random_model(config)
    module = model.tasks["latent"]
    assert isinstance(module, LatentModule)
    for part in PARTS:
        torch.nn.init.zeros_(module.decoder(part).latent.weight)
    report = evaluated(tmp_path, model)
    found = scores(report)
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    totals: dict[str, list[float]] = {part: [] for part in PARTS}
    for batch, _ in iterate_eval(config.evaluate.test, config, modalities, 64):
        for part in PARTS:
            truth, decoder = batch.originals[part], module.decoder(part)
            for b in sorted(set(truth.samples.tolist())):
                here = truth.samples == b
                inputs = torch.zeros(1, 1, decoder.latent.in_features)
                with torch.no_grad():
                    said = decoder(inputs, truth.samples[here] * 0, truth.places[here])[0]
                of_text = Categorical(logits=said) if part == "text" else Normal(said, 1.0)
                totals[part].append(float(of_text.log_prob(truth.content[here]).sum()))
    assert [len(totals[part]) for part in PARTS] == [TESTED, 5, TESTED]
    for part in PARTS:
        for source in PARTS:
            row = found[f"{part}_given_{source}"]
            assert row["n"] == (5 if "audio" in (part, source) else TESTED)
            if row["n"] == len(totals[part]):
                assert row["value"] == pytest.approx(np.mean(totals[part]), rel=1e-5)
                assert row["chance"] == pytest.approx(row["value"], rel=1e-5)
    exact = sum(map(sum, totals.values())) / TESTED
    assert found["elbo"]["n"] == found["importance"]["n"] == TESTED
    assert found["elbo"]["value"] < found["importance"]["value"] < exact + 1
    assert any("judged by this run's own features" in note for note in report.notes)


def test_a_model_that_generates_the_truth_is_coherent(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector of what is generated is that of the row's own item, which is the nearest."""

    def truth(self: LatentModule, target: str, z: Any, features: Any, batch: Any, lengths: Any) -> list[torch.Tensor]:
        its = batch.originals[target]
        nothing = torch.zeros(1, *its.content.shape[1:], dtype=its.content.dtype)
        each = [its.content[its.samples == b] for b in range(len(lengths))]
        return [content if len(content) else nothing for content in each]

    monkeypatch.setattr(LatentModule, "generate", truth)
    found = scores(evaluated(tmp_path, random_model(config)))
    for target in PARTS:
        row = found[f"{target}_given_image_to_{target}_r1"]
        assert row["value"] == 1.0 and row["n"] == (5 if target == "audio" else TESTED), target
        assert row["chance"] < 0.5


def test_some_rows_are_scored_where_there_are_more(config: RunConfig, tmp_path: Path) -> None:
    fewer = run_config.parse({**config.model_dump(mode="json"), "evaluate": {
        **config.evaluate.model_dump(mode="json"), "latents": {"draws": 1, "rows": 4}}})  # fmt: skip
    found = scores(evaluated(tmp_path, random_model(fewer)))
    assert found["elbo"]["n"] == 4  # every second of seven
    assert found["elbo"]["value"] == pytest.approx(found["importance"]["value"])  # of one draw


def test_the_page_shows_images_sounds_and_texts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_page, "load_model", with_weights(random_model(config), tmp_path))
    out = tmp_path / "page"
    latents_command(tmp_path, [], out, "", samples=2, steps=3)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "image: from all of a sample to all of the next" in page
    assert "audio: from image of a sample to text of the next" in page
    images, sounds = sorted(out.glob("*.png")), sorted(out.glob("*.wav"))
    ways = 1 + 3 * 2  # all, and ordered pairs
    each = 2 * (1 + 4) + ways * 2 * 3  # of two samples: true, from three and all; ways of three steps
    assert (len(images), len(sounds)) == (2 * each, each)  # a sound has the image of its spectrogram
    assert all(path.name in page for path in (*images, *sounds))
    assert Image.open(images[0]).size == (16, 16)
    wave, rate = soundfile.read(sounds[0])
    assert rate == 16_000 and np.abs(wave).max() > 0.5


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [("other", (2, 2), "from latent numbers are latent; --objective names one of them, not other"),
     ("", (1, 2), "--samples 1 and --steps 2 must be 2 or more")],
)  # fmt: skip
def test_what_has_no_page(
    name: str,
    sizes: tuple[int, int],
    message: str,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latents_page, "load_model", with_weights(random_model(config), tmp_path))
    with pytest.raises(ValueError, match=message):
        latents_command(tmp_path, [], tmp_path / "page", name, *sizes)
