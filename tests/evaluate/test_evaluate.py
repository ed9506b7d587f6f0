"""The whole evaluation on a random model and small shards, and the pass over them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.upgrade import upgraded
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.evaluate import run
from mmmoe_pretrain.evaluate.features import HeldOut, collect, sums_of_targets
from mmmoe_pretrain.evaluate.perplexity import count_train_targets
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.models.mmmoe import MMMoE
from tests.support import png_of, things, tiny_config, write_shards, write_tar, write_tokenizer

Patch = pytest.MonkeyPatch
SPLITS = {"train": range(6, 12), "test": range(6)}  # numbers of things
VOCAB = 48


def spoken(numbers: range) -> list[dict[str, Any]]:
    """Things, each seen once, named and spoken in two languages."""
    return [
        {**row, "key": f"{language}-{i}", "language": language, "label": "warm" if i < 2 else "cold",
         "name": f"{row['name']} {language}", "image_of": row["key"], "hertz": row["hertz"] * pitch}
        for i, row in enumerate(things(12)) if i in numbers
        for language, pitch in (("en", 1.0), ("fr", 1.1))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("evaluate")
    for split, numbers in SPLITS.items():
        write_shards(root / split, spoken(numbers))
    write_tokenizer(root / "tokens.model")
    return tiny_config(
        root,
        moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1},
        evaluate={"test": [str(root / "test")], "by": {"audio": "audio_kind"}, "within": "language", "min_items": 5},
    )


def modalities_of(config: RunConfig) -> Modalities:
    return build_modalities(config.modalities, config.data.tokenizer)


def held_out(config: RunConfig, batch_size: int = 64) -> HeldOut:
    modalities = modalities_of(config)
    batches = iterate_eval(config.evaluate.test, config, modalities, batch_size)
    return collect(random_model(config), batches)


def random_model(config: RunConfig) -> MMMoE:
    torch.manual_seed(0)
    model = MMMoE(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def load_random(monkeypatch: Patch, config: RunConfig, **sections: Any) -> None:
    """Every run has a random model of this config, with other ``sections``."""
    changed = config.model_copy(update=sections)
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(changed), changed, 7))


@pytest.fixture
def run_dir(tmp_path: Path, tiny: RunConfig, monkeypatch: Patch) -> Path:
    load_random(monkeypatch, tiny)
    return tmp_path


def test_evaluation_writes_every_score_with_its_baselines_and_the_routing_of_every_layer(
    run_dir: Path, tiny: RunConfig
) -> None:
    run.evaluate(run_dir)
    raw = json.loads((run_dir / "report.json").read_text())
    rows = {row["metric"]: row for row in raw["results"]}
    names = ("image", "speech", "text")
    assert {f"{a}_to_{b}_r{k}" for a in names for b in names if a != b for k in (1, 5, 10)} <= rows.keys()
    assert {
        "image_to_text_zero_shot_balanced", "speech_to_text_zero_shot", "speech_to_text_r10/fr",
    } <= rows.keys()  # fmt: skip
    assert (raw["run"], raw["step"]) == ("tiny", 7)
    assert (rows["image_to_text_r1"]["n"], rows["image_to_text_r1"]["candidates"]) == (12, 6)  # in two languages
    assert rows["image_to_text_r1"]["chance"] == pytest.approx(1 / 6)
    assert rows["speech_to_text_r5"]["chance"] == pytest.approx(5 / 6)
    assert rows["image_to_text_zero_shot"]["majority"] == pytest.approx(4 / 6)
    assert rows["captioning_perplexity"]["majority"] < rows["captioning_perplexity"]["chance"] == VOCAB
    layers = raw["routing"]["layers"]
    assert [layer["experts"] for layer in layers] == [4, 4]
    batch, _ = next(iterate_eval(tiny.evaluate.test, tiny, modalities_of(tiny), 64))
    for layer in layers:
        assert sum(layer["tokens"].values()) == int(batch.valid.sum())
        assert sum(layer["share"]["image"]) == pytest.approx(1.0)
        assert 0.0 <= layer["specialisation"] <= 1.0
        assert 0.0 <= layer["specialisation_untrained"] <= 1.0
    assert (run_dir / "routing.png").stat().st_size > 10_000
    page = (run_dir / "report.md").read_text()
    assert "](routing.png)" in page


def test_another_run_is_shown_beside_where_it_was_scored_on_the_same_shards(run_dir: Path, tiny: RunConfig) -> None:
    other, folder = run_dir / "other", tiny.evaluate.test[0]
    results = [{"metric": "image_to_text_r1", "value": 0.25, "n": 12}]
    values = {"run": "wide", "step": 3, "date": "today", "test": [f"{folder}/../test"], "routing": {}, "notes": []}
    other.mkdir()
    (other / "report.json").write_text(json.dumps({**values, "results": results}))
    run.evaluate(run_dir, beside=other)
    raw = json.loads((run_dir / "report.json").read_text())
    rows = {row["metric"]: row["beside"] for row in raw["results"]}
    assert (rows["image_to_text_r1"], rows["image_to_text_r5"]) == ({"wide": 0.25}, {"wide": None})
    assert "| wide | n |" in (run_dir / "report.md").read_text()
    assert any(note.startswith("column wide: that run at step 3, evaluated today") for note in raw["notes"])
    (other / "report.json").write_text(json.dumps({**values, "results": results, "test": ["elsewhere"]}))
    without = run.evaluate(run_dir, beside=other / "report.json")
    assert not any("beside" in row for row in without.results)
    assert f"no column of wide: its report is of elsewhere, and not of {folder}" in without.notes
    with pytest.raises(ValueError, match=r"absent/report.json does not exist; .* mmmoe evaluate .*absent$"):
        run.evaluate(run_dir, beside=run_dir / "absent")


def test_a_report_of_other_shards_is_not_replaced_without_out(run_dir: Path, tiny: RunConfig) -> None:
    run.evaluate(run_dir)
    before = (run_dir / "report.json").read_bytes()
    others = [tiny.data.train[0].path]
    with pytest.raises(ValueError, match=r"report.json is of .*test, and not of .*train; .* --out"):
        run.evaluate(run_dir, others)
    elsewhere = run.evaluate(run_dir, others, out=run_dir / "other", overrides=["seed=1"])
    assert elsewhere.test == others
    assert "with seed=1 instead of the run's own settings" in elsewhere.notes
    assert any("is trained on" in note for note in elsewhere.notes)
    assert (run_dir / "report.json").read_bytes() == before
    assert {path.name for path in (run_dir / "other").iterdir()} == {"report.json", "report.md", "routing.png"}
    run.evaluate(run_dir, others, out=run_dir)
    assert json.loads((run_dir / "report.json").read_text())["test"] == others


def test_retrieval_after_linear_cca_stands_beside_the_plain_one(
    tmp_path: Path, tiny: RunConfig, monkeypatch: Patch
) -> None:
    load_random(monkeypatch, tiny, evaluate=tiny.evaluate.model_copy(update={"cca": True}))
    report = run.evaluate(tmp_path)
    rows = {row["metric"]: row for row in report.results}
    plain = [name for name in rows if "_to_" in name and "zero_shot" not in name and "_cca_" not in name]
    assert len(plain) > 18
    for name in plain:
        beside = rows.pop(name.replace("_r", "_cca_r"))
        assert (beside["n"], beside["chance"]) == (rows[name]["n"], rows[name]["chance"])
    assert not any("_cca_" in name for name in rows)
    assert "where a name has _cca, image and text are compared after linear CCA, fitted on 12 training samples" in (
        report.notes
    )
    source = tiny.data.train[0].model_copy(update={"path": str(tmp_path / "elsewhere")})
    cca = {"evaluate": tiny.evaluate.model_copy(update={"cca": True})}
    load_random(monkeypatch, tiny, data=tiny.data.model_copy(update={"train": (source,)}), **cca)
    report = run.evaluate(tmp_path)
    assert not any("_cca_" in row["metric"] for row in report.results)
    assert any(note.startswith("no score after linear CCA: it is fitted on the training") for note in report.notes)


def test_a_pair_that_no_objective_compares_is_scored_where_the_config_names_it(
    tmp_path: Path, tiny: RunConfig, monkeypatch: Patch
) -> None:
    """The same weights have the same scores: those of a run that compares the pair."""
    load_random(monkeypatch, tiny)
    wanted = {row["metric"]: row["value"] for row in run.evaluate(tmp_path).results}
    bridged = tiny.objectives["contrastive"].model_copy(update={"pairs": {"image-text": 1.0, "audio-text": 1.0}})
    objectives = {**tiny.objectives, "contrastive": bridged}
    for pairs in ((), ("audio-image",)):
        scored = tiny.evaluate.model_copy(update={"pairs": pairs})
        load_random(monkeypatch, tiny, objectives=objectives, evaluate=scored)
        report = run.evaluate(tmp_path)
        found = {row["metric"]: row["value"] for row in report.results}
        left = {name: value for name, value in wanted.items() if name in found}
        assert found == left
        both_ways = {"image_to_speech_r1", "speech_to_image_r10"}
        assert both_ways <= left.keys() if pairs else not both_ways & left.keys()
        told = "audio and image were never compared in training (evaluate.pairs)"
        assert (told in report.notes) == bool(pairs)
    alone = tiny.objectives["contrastive"].model_copy(update={"pairs": {"image-text": 1.0}})
    load_random(monkeypatch, tiny, objectives={"contrastive": alone}, evaluate=scored)
    with pytest.raises(ValueError, match=r"evaluate\.pairs audio-image: no objective brings audio into a space with"):
        run.evaluate(tmp_path)


def test_scores_that_a_run_cannot_have_are_absent_with_a_note(
    tmp_path: Path, tiny: RunConfig, monkeypatch: Patch
) -> None:
    """No row of the kind that is wanted, no shards to count the training targets of, and then no such task."""
    rows = tiny.evaluate.model_copy(update={"rows": {"image-text": {"subset": ("absent",)}}})
    source = tiny.data.train[0].model_copy(update={"path": str(tmp_path / "elsewhere")})
    load_random(monkeypatch, tiny, evaluate=rows, data=tiny.data.model_copy(update={"train": (source,)}))
    report = run.evaluate(tmp_path)
    assert any("both image and text and {'subset': ('absent',)} (evaluate.rows)" in note for note in report.notes)
    assert not any(row["metric"].startswith("image_to_text") for row in report.results)
    assert report.value("speech_to_image_r10") > 0
    assert {row["metric"]: row for row in report.results}["captioning_perplexity"]["majority"] is None
    assert any("no majority for perplexity" in note for note in report.notes)
    load_random(monkeypatch, tiny, objectives={"contrastive": tiny.objectives["contrastive"]})
    alone = run.evaluate(tmp_path)
    assert alone.value("image_to_text_r5") > 0
    assert not any("perplexity" in row["metric"] for row in alone.results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": {"image": {"subset": ["named"]}}}, "evaluate.rows 'image' is not two of image, audio, text joined"),
        ({"pairs": ["image"]}, "evaluate.pairs 'image' is not two of image, audio, text joined"),
        ({"rows": {"image-image": {}}}, "evaluate.rows 'image-image' is not two of"),
        ({"by": {"speech": "audio_kind"}}, "evaluate.by 'speech' is none of image, audio, text"),
    ],
)
def test_settings_of_scores_that_name_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("unused"), evaluate=settings)


def test_an_upgraded_config_scores_as_it_did() -> None:
    old = {"data": {"train": [{"path": "train"}], "tokenizer": "tokens.model"}, "name": "old",
           "evaluate": {"image_rows": {"subset": ["named"]}, "min_clips_per_language": 15}}  # fmt: skip
    found = run_config.parse(upgraded(old)).evaluate
    assert found.rows == {"image-text": {"subset": ("named",)}}
    assert (found.by, found.within, found.min_items) == ({"audio": "audio_kind"}, "language", 15)


def test_another_tokenizer_than_the_run_had_is_refused(run_dir: Path) -> None:
    store.write_state(run_dir / "checkpoints", 7, {}, {"tokenizer_fingerprint": "feed"})
    with pytest.raises(ValueError, match="fingerprint"):
        run.evaluate(run_dir)


def test_scores_do_not_depend_on_the_batch_size(tiny: RunConfig) -> None:
    whole, parts = held_out(tiny), held_out(tiny, batch_size=5)
    assert whole.content == parts.content
    for modality, features in whole.features.items():
        np.testing.assert_allclose(features, parts.features[modality], atol=1e-5)
    (one,), (other,) = whole.predicted.values(), parts.predicted.values()
    np.testing.assert_allclose(np.sort(one.nll_G), np.sort(other.nll_G), rtol=1e-4)
    np.testing.assert_array_equal(one.targets_V, other.targets_V)


def test_one_image_in_two_languages_is_one_image(tiny: RunConfig) -> None:
    data = held_out(tiny)
    assert len(set(data.content["image"])) == 6
    assert len(set(data.content["audio"])) == len(set(data.content["text"])) == 12


def test_likelihoods_of_targets_are_summed_by_segment(tiny: RunConfig) -> None:
    modalities = modalities_of(tiny)
    batch, samples = next(iterate_eval(tiny.evaluate.test, tiny, modalities, 3))
    ones = torch.ones(len(batch.targets["captioning"]))
    found = sums_of_targets(batch, batch.targets["captioning"], ones, modalities.vocab_size)
    texts = [item.raw for sample in samples for item in sample.items if item.modality == "text"]
    lengths = [len(modalities.tokenizer.encode(text)) + 1 for text in texts]  # and the end mark
    assert found.tokens_G.tolist() == lengths
    assert found.nll_G.tolist() == lengths
    assert found.targets_V[modalities.tokenizer.eos_id] == 3
    assert set(found.first_G.tolist()) <= {0, 1}  # an image or audio


def test_features_that_are_not_finite_are_refused(tiny: RunConfig) -> None:
    model, modalities = random_model(tiny), modalities_of(tiny)
    torch.nn.init.constant_(model.joint_heads["image"].weight, float("nan"))
    with pytest.raises(ValueError, match="image feature of held-out sample 'en-0'"):
        collect(model, iterate_eval(tiny.evaluate.test, tiny, modalities, 4))


def test_training_targets_are_counted_with_their_end_marks(tiny: RunConfig) -> None:
    modalities = modalities_of(tiny)
    counts, samples = count_train_targets(tiny, modalities)
    texts = [row["name"] for row in spoken(SPLITS["train"])]
    assert samples == counts["captioning"][modalities.tokenizer.eos_id] == 12
    assert counts["captioning"].sum() == sum(len(modalities.tokenizer.encode(text)) + 1 for text in texts)
    assert count_train_targets(tiny, modalities, limit=3)[1] == 3


def test_views_pooled_together_and_documents_are_scored_by_their_names(
    tmp_path: Path, tiny: RunConfig, monkeypatch: Patch
) -> None:
    """Two images a thing, pooled as one representation, and documents of two texts around an image."""
    texts = []
    for split, numbers in SPLITS.items():
        samples: dict[str, dict[str, bytes]] = {}
        texts = []  # of the last split, which is scored
        for i in numbers:
            en, fr = spoken(range(i, i + 1))
            left, right = (png_of({**en, "image_of": f"{side} {i}"}) for side in ("left", "right"))
            meta = json.dumps({"label": en["label"]}).encode()
            samples[f"thing-{i}"] = {"left.png": left, "right.png": right, "txt": f"thing {i}".encode(), "json": meta}
            parts = json.dumps({"parts": [{"text": en["name"]}, {"member": "left.png"}, {"text": fr["name"]}]})
            samples[f"document-{i}"] = {"left.png": left, "json": parts.encode()}
            texts += [f"thing {i}", en["name"], fr["name"]]
        members = ((f"{key}.{name}", data) for key, its in samples.items() for name, data in its.items())
        write_tar(tmp_path / split / "00000.tar", members)
    image = {"kind": "image", "size": 16, "stem_channels": 8}
    config = tiny_config(
        tmp_path,
        data={"train": [{"path": str(tmp_path / "train")}], "tokenizer": tiny.data.tokenizer},
        modalities={"left": image, "right": image, "text": {"kind": "text", "max_tokens": 16}},
        representations={"both": ["left", "right"]},
        objectives={"pairs": {"kind": "contrastive", "pairs": {"both-text": 1, "left-right": 1}},
                    "prose": {"kind": "next_token"}},
        evaluate={"test": [str(tmp_path / "test")]},
    )  # fmt: skip
    load_random(monkeypatch, config)
    report = run.evaluate(tmp_path / "run")
    rows = {row["metric"]: row for row in report.results}
    pairs = ["both_to_text", "text_to_both", "left_to_right", "right_to_left"]
    expected = {f"{pair}_r{k}" for pair in pairs for k in (1, 5, 10)} | {"both_to_text_zero_shot"}
    assert expected | {"both_to_text_zero_shot_balanced", "prose_perplexity"} == rows.keys()
    assert (rows["both_to_text_r1"]["n"], rows["left_to_right_r1"]["candidates"]) == (6, 6)
    encode = modalities_of(config).tokenizer.encode
    assert rows["prose_perplexity"]["n"] == sum(len(encode(text)) + 1 for text in texts)  # of things and documents
    assert rows["prose_perplexity"]["majority"] < rows["prose_perplexity"]["chance"] == VOCAB
    assert sum(report.routing["layers"][0]["tokens"].values()) > 0
