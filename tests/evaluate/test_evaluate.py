"""The whole evaluation on a random model and hand-made shards, and the pass over them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from PIL import Image

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import IGNORE
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.evaluate import run
from mmmoe_pretrain.evaluate.features import caption_sums, collect
from mmmoe_pretrain.evaluate.unigrams import count_train_tokens
from mmmoe_pretrain.modalities import build_codecs
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
        "modalities": {"image": {"size": 16, "stem_channels": 8},
                       "audio": {"max_seconds": 0.4, "stem_channels": 8},
                       "text": {"max_tokens": 16}},
        "model": {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "ffn_hidden_size": 16,
                  "embedding_size": 8},
        "moe": {"num_experts": 4, "expert_hidden_size": 8},
        "objectives": {"captioning": {"weight": 1.0}},
        "evaluate": {"test": [str(root / "test")], "min_clips_per_language": 5},
    })  # fmt: skip


def random_model(config: RunConfig) -> MMMoE:
    torch.manual_seed(0)
    model = MMMoE(config, build_codecs(config).text.vocab_size)
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
        "zero_shot_accuracy",
        "zero_shot_balanced",
        "caption_perplexity",
        "speech_to_text_r10/fr",
    } <= rows.keys()
    assert (raw["run"], raw["step"]) == ("tiny", 7)
    assert (rows["image_to_text_r1"]["n"], rows["image_to_text_r1"]["candidates"]) == (12, 6)  # in two languages
    assert rows["image_to_text_r1"]["chance"] == pytest.approx(1 / 6)
    assert rows["speech_to_text_r5"]["chance"] == pytest.approx(5 / 6)
    assert rows["zero_shot_accuracy"]["majority"] == pytest.approx(4 / 6)
    assert rows["caption_perplexity"]["chance"] == 24
    assert rows["caption_perplexity"]["majority"] < 24
    assert not any("dense" in row for row in rows.values())
    assert "dense" not in (run_dir / "report.md").read_text().casefold()


def test_routing_counts_every_token_of_every_layer(run_dir: Path, tiny: RunConfig) -> None:
    report = run.evaluate(run_dir, dense_results=None)
    assert [layer["experts"] for layer in report.routing["layers"]] == [4, 4]
    batch, _ = next(iterate_eval(tiny.evaluate.test, tiny, build_codecs(tiny), 64))
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


def test_a_report_of_other_shards_is_not_replaced_unless_told(run_dir: Path, tiny: RunConfig) -> None:
    run.evaluate(run_dir)
    before = (run_dir / "report.json").read_bytes()
    others = [tiny.data.train[0].path]
    with pytest.raises(ValueError, match=r"report.json is of .*test, and not of .*train; .* --out"):
        run.evaluate(run_dir, others)
    told = run.evaluate(run_dir, others, out=run_dir / "other", overrides=["seed=1"])
    assert told.test == others
    assert "with seed=1 instead of the run's own settings" in told.notes
    assert (run_dir / "report.json").read_bytes() == before
    assert {path.name for path in (run_dir / "other").iterdir()} == {"report.json", "report.md", "routing.png"}
    run.evaluate(run_dir, others, out=run_dir)
    assert json.loads((run_dir / "report.json").read_text())["test"] == others


def test_what_is_trained_and_cannot_be_scored_is_named(
    run_dir: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tiny.evaluate.model_copy(update={"image_rows": {"subset": ("absent",)}})
    monkeypatch.setattr(
        run, "load_model", lambda *_: (random_model(tiny), tiny.model_copy(update={"evaluate": nothing}), 7)
    )
    report = run.evaluate(run_dir)
    assert any("{'subset': ('absent',)} (evaluate.image_rows)" in note for note in report.notes)
    assert not any(row["metric"].startswith(("image_to_text", "zero_shot")) for row in report.results)
    assert report.value("speech_to_image_r10") > 0


def test_a_run_without_held_out_shards_is_told_what_to_give(
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
    codecs, model = build_codecs(tiny), random_model(tiny)
    vocab = codecs.text.vocab_size
    whole, parts = (collect(model, iterate_eval(tiny.evaluate.test, tiny, codecs, b), vocab) for b in (64, 5))
    assert whole.content == parts.content
    for modality, features in whole.features.items():
        np.testing.assert_allclose(features, parts.features[modality], atol=1e-5)
    np.testing.assert_allclose(np.sort(whole.captions.nll_G), np.sort(parts.captions.nll_G), rtol=1e-4)
    np.testing.assert_array_equal(whole.captions.targets_V, parts.captions.targets_V)


def test_one_picture_in_two_languages_is_one_picture(tiny: RunConfig) -> None:
    codecs = build_codecs(tiny)
    data = collect(random_model(tiny), iterate_eval(tiny.evaluate.test, tiny, codecs, 64), codecs.text.vocab_size)
    assert len(set(data.content["image"])) == 6
    assert len(set(data.content["audio"])) == len(set(data.content["text"])) == 12


def test_caption_likelihoods_are_summed_by_caption(tiny: RunConfig) -> None:
    codecs = build_codecs(tiny)
    batch, samples = next(iterate_eval(tiny.evaluate.test, tiny, codecs, 3))
    targets = batch.targets[batch.targets != IGNORE]
    captions = caption_sums(batch, torch.ones(len(targets)), codecs.text.vocab_size)
    lengths = [len(codecs.text.encode(sample.raw_text)) + 1 for sample in samples]  # and the end mark
    assert captions.tokens_G.tolist() == lengths
    assert captions.nll_G.tolist() == lengths
    assert captions.targets_V[codecs.text.eos_id] == 3
    assert set(captions.prefix_G.tolist()) <= {0, 1}


def test_diverged_model_is_named_not_scored(tiny: RunConfig) -> None:
    model = random_model(tiny)
    torch.nn.init.constant_(model.joint_heads["image"].weight, float("nan"))
    codecs = build_codecs(tiny)
    with pytest.raises(ValueError, match="image feature of held-out sample 'en-0'"):
        collect(model, iterate_eval(tiny.evaluate.test, tiny, codecs, 4), codecs.text.vocab_size)


def test_training_captions_are_counted_with_their_end_marks(tiny: RunConfig) -> None:
    codecs = build_codecs(tiny)
    counts, captions = count_train_tokens(tiny, codecs)
    texts = [f"{word} {language}" for word in TRAIN_WORDS for language in LANGUAGES]
    assert captions == counts[codecs.text.eos_id] == 12
    assert counts.sum() == sum(len(codecs.text.encode(text)) + 1 for text in texts)
    assert count_train_tokens(tiny, codecs, limit=3)[1] == 3


def test_absent_training_shards_cost_the_baseline_not_the_report(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.data.train[0].model_copy(update={"path": str(tmp_path / "elsewhere")})
    moved = tiny.model_copy(update={"data": tiny.data.model_copy(update={"train": (source,)})})
    monkeypatch.setattr(run, "load_model", lambda *_: (random_model(moved), moved, 7))
    report = run.evaluate(tmp_path, dense_results=None)
    assert {r["metric"]: r for r in report.results}["caption_perplexity"]["majority"] is None
    assert any("no majority for caption_perplexity" in note for note in report.notes)


def test_model_that_cannot_caption_has_no_perplexity(tiny: RunConfig) -> None:
    codecs = build_codecs(tiny)
    batch, _ = next(iterate_eval(tiny.evaluate.test, tiny, codecs, 3))
    captions = caption_sums(batch, torch.zeros(0), codecs.text.vocab_size)
    assert captions.targets_V.sum() == 0
    assert len(captions.nll_G) == 0
