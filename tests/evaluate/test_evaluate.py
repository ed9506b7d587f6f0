"""The whole evaluation on a random model and hand-made shards, and the pass over them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from PIL import Image

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

WORDS = ["red", "green", "blue", "grey", "dark", "pale"]
TRAIN_WORDS = [word + word[0] for word in WORDS]  # other texts of the same letters
LANGUAGES = ("en", "fr")


def png(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def wav(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, rng.normal(scale=0.1, size=3200), 16_000, format="WAV")
    return out.getvalue()


def write_shard(folder: Path, seed: int, words: list[str]) -> None:
    """Six things, each seen once, named and spoken in two languages."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, word in enumerate(words):
            image = png(rng)
            for language in LANGUAGES:
                meta = {"group": f"g{i}", "language": language, "label": "warm" if i < 2 else "cold",
                        "subset": "named", "audio_kind": "speech"}  # fmt: skip
                members = {"png": image, "wav": wav(rng), "txt": f"{word} {language}".encode(),
                           "json": json.dumps(meta).encode()}  # fmt: skip
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{language}-{i}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("evaluate")
    write_shard(root / "train", 0, TRAIN_WORDS)
    write_shard(root / "test", 1, WORDS)
    texts = [f"{word} {language}" for word in WORDS + TRAIN_WORDS for language in LANGUAGES]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(root / "tokens"), vocab_size=24, model_type="bpe",
        pad_id=3, minloglevel=2,
    )  # fmt: skip
    return run_config.parse({
        "name": "tiny",
        "data": {"train": [{"path": str(root / "train")}], "tokenizer": str(root / "tokens.model")},
        "modalities": {"image": {"kind": "image", "size": 16, "stem_channels": 8},
                       "audio": {"kind": "audio", "max_seconds": 0.4, "stem_channels": 8},
                       "text": {"kind": "text", "max_tokens": 16}},
        "model": {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "ffn_hidden_size": 16,
                  "embedding_size": 8, "vocab_size": 24},
        "moe": {"num_experts": 4, "expert_hidden_size": 8},
        "objectives": {
            "pairs": {"kind": "contrastive", "pairs": {"image-text": 1, "audio-text": 1, "image-audio": 1}},
            "captions": {"kind": "next_token", "parts": [["image", "audio"], "text"], "fraction": 0.25},
        },
        "evaluate": {"test": [str(root / "test")], "by": {"audio": "audio_kind"}, "within": "language",
                     "min_items": 5},
    })  # fmt: skip


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


@pytest.fixture
def run_dir(tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(tiny), tiny, 7))
    return tmp_path


def test_evaluation_writes_every_score_beside_its_baselines(run_dir: Path) -> None:
    run.evaluate(run_dir, dense_results=None)
    raw = json.loads((run_dir / "report.json").read_text())
    rows = {row["metric"]: row for row in raw["results"]}
    pairs = [
        "image_to_text",
        "text_to_image",
        "speech_to_text",
        "text_to_speech",
        "image_to_speech",
        "speech_to_image",
    ]
    assert {f"{pair}_r{k}" for pair in pairs for k in (1, 5, 10)} <= rows.keys()
    assert {
        "image_to_text_zero_shot",
        "image_to_text_zero_shot_balanced",
        "speech_to_text_zero_shot",
        "captions_perplexity",
        "speech_to_text_r10/fr",
    } <= rows.keys()
    assert (raw["run"], raw["step"]) == ("tiny", 7)
    assert (rows["image_to_text_r1"]["n"], rows["image_to_text_r1"]["candidates"]) == (12, 6)  # in two languages
    assert rows["image_to_text_r1"]["chance"] == pytest.approx(1 / 6)
    assert rows["speech_to_text_r5"]["chance"] == pytest.approx(5 / 6)
    assert rows["image_to_text_zero_shot"]["majority"] == pytest.approx(4 / 6)
    assert rows["captions_perplexity"]["chance"] == 24
    assert rows["captions_perplexity"]["majority"] < 24
    assert not any("dense" in row for row in rows.values())
    assert "dense" not in (run_dir / "report.md").read_text().casefold()


def test_routing_counts_every_token_of_every_layer(run_dir: Path, tiny: RunConfig) -> None:
    report = run.evaluate(run_dir, dense_results=None)
    assert [layer["experts"] for layer in report.routing["layers"]] == [4, 4]
    batch, _ = next(iterate_eval(tiny.evaluate.test, tiny, modalities_of(tiny), 64))
    for layer in report.routing["layers"]:
        assert sum(layer["tokens"].values()) == int(batch.valid.sum())
        assert sum(layer["share"]["image"]) == pytest.approx(1.0)
        assert 0.0 <= layer["specialisation"] <= 1.0
        assert 0.0 <= layer["specialisation_untrained"] <= 1.0
    assert (run_dir / "routing.png").stat().st_size > 10_000
    assert "![](routing.png)" in (run_dir / "report.md").read_text()


def test_dense_run_stands_beside_each_score(run_dir: Path, tiny: RunConfig) -> None:
    record = run_dir / "results.json"
    results = [{"metric": "image_to_text_r1", "value": 0.25}]
    record.write_text(json.dumps({"dense": {"test": list(tiny.evaluate.test), "results": results}}))
    rows = {row["metric"]: row for row in run.evaluate(run_dir, dense_results=record).results}
    assert rows["image_to_text_r1"]["dense"] == 0.25
    assert rows["image_to_text_r5"]["dense"] is None
    assert "| 25.0% |" in (run_dir / "report.md").read_text()


def test_scores_on_training_shards_are_called_so(run_dir: Path, tiny: RunConfig) -> None:
    report = run.evaluate(run_dir, [tiny.data.train[0].path], dense_results=None)
    assert any("is trained on" in note for note in report.notes)


def test_a_report_of_other_shards_is_not_replaced_without_out(run_dir: Path, tiny: RunConfig) -> None:
    run.evaluate(run_dir)
    before = (run_dir / "report.json").read_bytes()
    others = [tiny.data.train[0].path]
    with pytest.raises(ValueError, match=r"report.json is of .*test, and not of .*train; .* --out"):
        run.evaluate(run_dir, others)
    report_elsewhere = run.evaluate(run_dir, others, out=run_dir / "other", overrides=["seed=1"])
    assert report_elsewhere.test == others
    assert "with seed=1 instead of the run's own settings" in report_elsewhere.notes
    assert (run_dir / "report.json").read_bytes() == before
    assert {path.name for path in (run_dir / "other").iterdir()} == {"report.json", "report.md", "routing.png"}
    run.evaluate(run_dir, others, out=run_dir)
    assert json.loads((run_dir / "report.json").read_text())["test"] == others


def test_what_is_trained_and_cannot_be_scored_is_named(
    run_dir: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tiny.evaluate.model_copy(update={"rows": {"image-text": {"subset": ("absent",)}}})
    monkeypatch.setattr(
        run, "load_model", lambda *_: (random_model(tiny), tiny.model_copy(update={"evaluate": nothing}), 7)
    )
    report = run.evaluate(run_dir)
    assert any("both image and text and {'subset': ('absent',)} (evaluate.rows)" in note for note in report.notes)
    assert not any(row["metric"].startswith("image_to_text") for row in report.results)
    assert report.value("speech_to_image_r10") > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": {"image": {"subset": ["named"]}}}, "evaluate.rows 'image' is not two of image, audio, text joined"),
        ({"rows": {"image-image": {}}}, "evaluate.rows 'image-image' is not two of"),
        ({"by": {"speech": "audio_kind"}}, "evaluate.by 'speech' is none of image, audio, text"),
    ],
)
def test_settings_of_scores_that_name_nothing_are_refused(
    tiny: RunConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_config.parse({**tiny.model_dump(), "evaluate": settings})


def test_an_upgraded_config_scores_as_it_did() -> None:
    old = {"data": {"train": [{"path": "train"}], "tokenizer": "tokens.model"}, "name": "old",
           "evaluate": {"image_rows": {"subset": ["named"]}, "min_clips_per_language": 15}}  # fmt: skip
    found = run_config.parse(upgraded(old)).evaluate
    assert found.rows == {"image-text": {"subset": ("named",)}}
    assert (found.by, found.within, found.min_items) == ({"audio": "audio_kind"}, "language", 15)


def test_a_run_without_held_out_shards_gets_an_error_with_the_option(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tiny.model_copy(update={"evaluate": tiny.evaluate.model_copy(update={"test": ()})})
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(bare), bare, 7))
    with pytest.raises(ValueError, match="--test"):
        run.evaluate(tmp_path, dense_results=None)


def test_another_tokenizer_than_the_run_had_is_refused(run_dir: Path) -> None:
    store.write_state(run_dir / "checkpoints", 7, {}, {"tokenizer_fingerprint": "feed"})
    with pytest.raises(ValueError, match="fingerprint"):
        run.evaluate(run_dir, dense_results=None)


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
    ones = torch.ones(len(batch.targets["captions"]))
    found = sums_of_targets(batch, "captions", ones, modalities.vocab_size)
    texts = [item.raw for sample in samples for item in sample.items if item.modality == "text"]
    lengths = [len(modalities.tokenizer.encode(text)) + 1 for text in texts]  # and the end mark
    assert found.tokens_G.tolist() == lengths
    assert found.nll_G.tolist() == lengths
    assert found.targets_V[modalities.tokenizer.eos_id] == 3
    assert set(found.first_G.tolist()) <= {0, 1}  # an image or audio


def test_diverged_model_is_named_not_scored(tiny: RunConfig) -> None:
    model, modalities = random_model(tiny), modalities_of(tiny)
    torch.nn.init.constant_(model.joint_heads["image"].weight, float("nan"))
    with pytest.raises(ValueError, match="image feature of held-out sample 'en-0'"):
        collect(model, iterate_eval(tiny.evaluate.test, tiny, modalities, 4))


def test_training_targets_are_counted_with_their_end_marks(tiny: RunConfig) -> None:
    modalities = modalities_of(tiny)
    counts, samples = count_train_targets(tiny, modalities)
    texts = [f"{word} {language}" for word in TRAIN_WORDS for language in LANGUAGES]
    assert samples == counts["captions"][modalities.tokenizer.eos_id] == 12
    assert counts["captions"].sum() == sum(len(modalities.tokenizer.encode(text)) + 1 for text in texts)
    assert count_train_targets(tiny, modalities, limit=3)[1] == 3


def test_absent_training_shards_cost_the_baseline_not_the_report(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.data.train[0].model_copy(update={"path": str(tmp_path / "elsewhere")})
    moved = tiny.model_copy(update={"data": tiny.data.model_copy(update={"train": (source,)})})
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(moved), moved, 7))
    report = run.evaluate(tmp_path, dense_results=None)
    assert {r["metric"]: r for r in report.results}["captions_perplexity"]["majority"] is None
    assert any("no majority for perplexity" in note for note in report.notes)


def test_a_run_that_predicts_nothing_has_no_perplexity(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tiny.model_copy(update={"objectives": {"pairs": tiny.objectives["pairs"]}})
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(alone), alone, 7))
    report = run.evaluate(tmp_path)
    assert report.value("image_to_text_r5") > 0
    assert not any("perplexity" in row["metric"] for row in report.results)


def test_views_pooled_together_and_documents_are_scored_by_their_names(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images a thing, pooled as one representation, and documents of two texts around an image."""
    rng = np.random.default_rng(0)
    for split, words in (("train", TRAIN_WORDS), ("test", WORDS)):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "00000.tar", "w") as tar:
            for i, word in enumerate(words):
                parts = [{"text": f"{word} en"}, {"member": "left.png"}, {"text": f"{word} fr"}]
                meta = json.dumps({"label": "warm" if i < 2 else "cold"}).encode()
                document = {"left.png": png(rng), "json": json.dumps({"parts": parts}).encode()}
                thing = {"left.png": png(rng), "right.png": png(rng), "txt": word.encode(), "json": meta}
                for key, members in ((f"thing-{i}", thing), (f"document-{i}", document)):
                    for extension, content in members.items():
                        info = tarfile.TarInfo(f"{key}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    image = {"kind": "image", "size": 16, "stem_channels": 8}
    config = run_config.parse({
        **tiny.model_dump(),
        "data": {"train": [{"path": str(tmp_path / "train")}], "tokenizer": tiny.data.tokenizer},
        "modalities": {"left": image, "right": image, "text": {"kind": "text", "max_tokens": 16}},
        "representations": {"both": ["left", "right"]},
        "objectives": {"pairs": {"kind": "contrastive", "pairs": {"both-text": 1, "left-right": 1}},
                       "prose": {"kind": "next_token"}},
        "evaluate": {"test": [str(tmp_path / "test")]},
    })  # fmt: skip
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(config), config, 7))
    report = run.evaluate(tmp_path / "run")
    rows = {row["metric"]: row for row in report.results}
    pairs = ["both_to_text", "text_to_both", "left_to_right", "right_to_left"]
    expected = {f"{pair}_r{k}" for pair in pairs for k in (1, 5, 10)} | {"both_to_text_zero_shot"}
    assert expected | {"both_to_text_zero_shot_balanced", "prose_perplexity"} == rows.keys()
    assert (rows["both_to_text_r1"]["n"], rows["left_to_right_r1"]["candidates"]) == (6, 6)
    encode = modalities_of(config).tokenizer.encode
    texts = [*WORDS, *(f"{word} {language}" for word in WORDS for language in LANGUAGES)]  # of things and documents
    assert rows["prose_perplexity"]["n"] == sum(len(encode(text)) + 1 for text in texts)
    assert rows["prose_perplexity"]["majority"] < rows["prose_perplexity"]["chance"] == 24
    assert sum(report.routing["layers"][0]["tokens"].values()) > 0
