"""``mmmoe generate`` and the scores of generated texts, of a run that has learned to name the colour of an image."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.checkpoint.state import model_key, persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.evaluate.generation import scores_of
from mmmoe_pretrain.evaluate.rows import open_rows
from mmmoe_pretrain.export.write import export_run
from mmmoe_pretrain.generate.command import Request, generate_command, open_model
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.runtime import named_device
from tests.export.support import write_checkpoint
from tests.support import png_of, things, tiny_config, write_shards, write_tokenizer

LANGUAGES = ("en", "fr")


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """An image's name is its colour alone, in one of two languages, one of which writes it backwards."""
    found = []
    for i, row in enumerate(things(first + count)[first:]):
        language = LANGUAGES[i // 8 % 2]
        name = row["label"] if language == "en" else row["label"][::-1]
        found.append({**row, "name": name, "language": language})
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("generate")
    write_shards(root / "train", rows(0, 64))
    write_shards(root / "test", rows(64, 16))
    write_tokenizer(root / "tokens.model")
    config = tiny_config(
        root,
        modalities={
            "image": {"kind": "image", "size": 16, "patch": 16, "stem": "linear", "augment": False, "flip": False},
            "language": {"kind": "text", "field": "language", "max_tokens": 4},
            "text": {"kind": "text", "members": ["txt"], "max_tokens": 8},
        },
        model={"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 32},
        moe={"num_experts": 4, "expert_hidden_size": 32, "every": 2, "losses": {"balance": 0.01}},
        objectives={"captions": {"kind": "next_token", "parts": ["image", "language", "text"], "loss_on": ["text"]}},
        evaluate={"test": [str(root / "test")], "keep_seen_texts": True, "within": "language", "min_items": 4,
                  "generate": {"captions": {"method": "beam", "beams": 2}}},
    )  # fmt: skip
    learn(config)
    return config


def learn(config: RunConfig) -> None:
    """Train on the captions alone, and save the run."""
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    model = PretrainingModel(config.with_vocabulary(modalities.vocab_size))
    path = Path(config.data.train[0].path)
    batches = [batch for batch, _ in iterate_eval([path], config, modalities, batch_size=32)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in batches * 20:
        loss = model.mmmoe(batch)[0].token_nll["captions"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    weights = {**dict(model.named_parameters()), **persistent_buffers(model)}
    state = {model_key(name): tensor.detach() for name, tensor in weights.items()}
    write_checkpoint(config, modalities, len(batches) * 20, state)


def generated(config: RunConfig, out: Path, run: Path | None = None, **request: Any) -> list[dict[str, Any]]:
    asked = Request(**{"task": "captions", **request})
    generate_command(run or config.run_dir, asked, out, [], "cpu")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Of colours in order; none was trained on."""
    paths = []
    for row in things(80)[72:76]:
        (path := tmp_path / f"{row['label']}.png").write_bytes(png_of(row))
        paths.append(str(path))
    return paths


@pytest.mark.timeout(120)
def test_an_image_gets_its_name_in_the_language_that_is_asked_for(
    trained: RunConfig, images: list[str], tmp_path: Path
) -> None:
    for options in ({"method": "greedy"}, {"method": "beam", "beams": 3}, {"method": "sample", "top_k": 1}):
        for language, backwards in (("en", 1), ("fr", -1)):
            lines = generated(trained, tmp_path / "out.jsonl", files=images,
                              by_name=[f"language={language}"], options=options)  # fmt: skip
            names = [Path(image).stem for image in images]
            assert [line["output"] for line in lines] == [name[::backwards] for name in names]
            assert [line["given"] for line in lines] == [{"image": i, "language": language} for i in images]
            assert all(line["ended"] and math.exp(line["log_probability"]) > 0.5 for line in lines)


def test_a_text_goes_on_from_its_beginning(trained: RunConfig, images: list[str], tmp_path: Path) -> None:
    lines = generated(trained, tmp_path / "out.jsonl", data=trained.evaluate.test, options={"prompt_tokens": 2})
    whole = {row["key"]: row["name"] for row in rows(64, 16) if row["name"] != "grey"}  # of two pieces
    assert {line["key"]: line["prompt"] + line["output"] for line in lines} == whole
    assert all(line["output"] == line["reference"] for line in lines)
    (line,) = generated(trained, tmp_path / "out.jsonl", files=images[:1], texts=["d"],
                        by_name=["language=fr"])  # fmt: skip
    assert (line["prompt"], line["output"]) == ("d", "er")


def test_shards_and_an_export_give_the_same(trained: RunConfig, tmp_path: Path) -> None:
    export_run(trained.run_dir, tmp_path / "export")
    lines = generated(trained, tmp_path / "run.jsonl", data=trained.evaluate.test, options={"samples": 8})
    assert [line["key"] for line in lines] == [f"thing-{i:03d}" for i in (64, 66, 68, 70, 72, 74, 76, 79)]
    assert all(line["output"] == line["reference"] for line in lines)
    again = generated(trained, tmp_path / "export.jsonl", run=tmp_path / "export", data=trained.evaluate.test,
                      options={"samples": 8, "method": "beam", "beams": 2})  # fmt: skip
    assert again == lines


def test_generated_texts_are_scored_by_language(trained: RunConfig) -> None:
    model, config, _ = open_model(trained.run_dir, [], named_device("cpu"))
    ((found, notes),) = scores_of(model, open_rows(trained.run_dir, config, None))
    values = {score.metric: (score.value, score.n) for score in found}
    letters = [sum(len(row["name"]) for row in rows(64, 16)[part : part + 8]) for part in (0, 8)]
    assert values == {
        "captions_wer": (0.0, 16), "captions_cer": (0.0, sum(letters)), "captions_exact": (1.0, 16),
        "captions_wer/en": (0.0, 8), "captions_cer/en": (0.0, letters[0]), "captions_exact/en": (1.0, 8),
        "captions_wer/fr": (0.0, 8), "captions_cer/fr": (0.0, letters[1]), "captions_exact/fr": (1.0, 8),
    }  # fmt: skip
    assert notes == ["captions is generated by beam (beams 2, length_penalty 1.0)"]
    assert {score.metric: score.majority for score in found}["captions_exact"] == 1 / 16


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"task": "caption"}, "no task caption generates; did you mean captions?"),
        (
            {"files": ["a.wav"]},
            "a.wav is read as no modality, and task captions generates text from image and language",
        ),
        ({"files": ["nothing.png"], "by_name": ["language=en"]}, "no file nothing.png to read as image"),
        ({"texts": ["red"]}, "generates text from image and language, and is given nothing"),
        ({"by_name": ["langage=en"]}, "did you mean language?"),
        ({"files": ["a.png", "b.png"], "by_name": ["language=en"] * 3}, "one for each"),
        ({"texts": ["red"], "data": ["shards"]}, "give one of both"),
        ({"options": {"method": "greedy", "beams": 3}}, "beams is of method beam, and this is greedy"),
        ({"options": {"modality": "image"}}, "task captions does not generate image; it generates text"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_generated_is_refused(
    trained: RunConfig, tmp_path: Path, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generated(trained, tmp_path / "out.jsonl", **request_)
    assert not any(tmp_path.iterdir())


def test_scores_of_a_task_that_is_not_there_are_refused_before_training(tmp_path: Path) -> None:
    message = r"evaluate.generate capitons: there is no such objective; there are .*captioning"
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, evaluate={"generate": {"capitons": {}}})


def test_a_prompt_without_room_and_a_file_that_is_no_image_are_refused(
    trained: RunConfig, images: list[str], tmp_path: Path
) -> None:
    for text, message in (("red green blue grey", "longer than text may be"), ("r" * 7, "leaves no room")):
        with pytest.raises(ValueError, match=message):
            generated(trained, tmp_path / "out", files=images[:1], texts=[text], by_name=["language=en"])
    Path(images[0]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red\.png cannot be read as image: .*; it reads png"):
        generated(trained, tmp_path / "out", files=images[:1], by_name=["language=en"])
