"""Next-token prediction: which tokens of a sample are predicted, from what, and how often; by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Item, Part, Sample, SampleMeta, Segment
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.objectives.base import Expected
from tests.support import pack_settings, tiny_config

KINDS = {
    "image": {"kind": "image", "size": 16, "patch": 8},  # 4 tokens
    "audio": {"kind": "audio", "n_mels": 8, "patch": 2, "max_seconds": 0.1},
    "title": {"kind": "text", "max_tokens": 4},
    "text": {"kind": "text", "max_tokens": 6},
}


def values_of(**tasks: Any) -> dict[str, Any]:
    return {"modalities": KINDS, "objectives": {name: {"kind": "next_token", **its} for name, its in tasks.items()}}


def settings_of(**task: Any) -> PackSettings:
    return pack_settings(tiny_config(Path("unused"), **values_of(task=task)))


def image() -> Item:
    return Item("image", np.zeros((3, 16, 16), np.uint8))


def audio(tokens: int) -> Item:
    return Item("audio", np.zeros((8, 2 * tokens), np.float32))


def text(*ids: int, name: str = "text", loss: bool = True) -> Item:
    return Item(name, np.asarray([1, *ids, 2]), loss=loss)


def sample(*items: Item, document: bool = False) -> Sample:
    return Sample(SampleMeta("a"), items, document)


def segments(settings: PackSettings, of: Sample, seed: int = 0) -> list[Segment]:
    return list(settings.objectives["task"].segments(of, np.random.default_rng(seed)))


def seen(part: Part) -> tuple[int, int, str, list[int] | None, int]:
    """Item, tokens, attention, targets, first position."""
    assert part.start == 0
    targets = None if part.targets is None else part.targets.tolist()
    return part.item, len(part), part.attention, targets, part.first_position


ALONE = {}
CAPTIONED = {"parts": ["image", "text"]}
EITHER = {"parts": [["image", "audio"], "text"]}


@pytest.mark.parametrize(
    ("task", "of", "expected"),
    [
        # A text alone: begin 5 6 predicts 5 6 end.
        (ALONE, sample(text(5, 6)), [(0, 3, "causal", [5, 6, 2], 0)]),
        (ALONE, sample(image(), text(5, 6)), [(1, 3, "causal", [5, 6, 2], 0)]),
        # Several in a sample follow each other, each with its own marks; positions count on.
        (ALONE, sample(text(7, name="title"), text(5, 6)),
         [(0, 2, "causal", [7, 2], 0), (1, 3, "causal", [5, 6, 2], 2)]),
        (ALONE, sample(image()), None),
        # Behind an image, from position 0 on as everywhere: where it stands says its modality.
        (CAPTIONED, sample(image(), text(5)), [(0, 4, "full", None, 0), (1, 2, "causal", [5, 2], 0)]),
        (CAPTIONED, sample(text(5), image()), [(1, 4, "full", None, 0), (0, 2, "causal", [5, 2], 0)]),
        (CAPTIONED, sample(audio(2), text(5)), None),
        (EITHER, sample(audio(2), text(5)), [(0, 2, "full", None, 0), (1, 2, "causal", [5, 2], 0)]),
        (EITHER, sample(text(5)), None),
        # A text that is read before another one.
        ({"parts": ["title", "text"]}, sample(text(7, name="title"), text(5)),
         [(0, 2, "causal", [7, 2], 0), (1, 2, "causal", [5, 2], 0)]),
        ({"parts": ["title", "text"], "loss_on": ["text"]}, sample(text(7, name="title"), text(5)),
         [(0, 2, "causal", None, 0), (1, 2, "causal", [5, 2], 0)]),
        # What its document marks as without a loss is context alone.
        (CAPTIONED, sample(image(), text(5, loss=False)), None),
        # A document: full parts before the first text, all after it causal, whatever they are.
        (ALONE, sample(image(), audio(2), text(5, 6), image(), text(7, loss=False), text(8), document=True),
         [(0, 4, "full", None, 0), (1, 2, "full", None, 4), (2, 3, "causal", [5, 6, 2], 6),
          (3, 4, "causal", None, 9), (4, 2, "causal", None, 13), (5, 2, "causal", [8, 2], 15)]),
        (ALONE, sample(image(), image(), document=True), None),
        # Of a document that is asked for its parts, the first of each, laid out as those of any other sample.
        (CAPTIONED, sample(text(5), image(), text(6), document=True),
         [(1, 4, "full", None, 0), (0, 2, "causal", [5, 2], 0)]),
    ],
)  # fmt: skip
def test_parts_and_targets(task: dict[str, Any], of: Sample, expected: list[Any] | None) -> None:
    found = segments(settings_of(**task), of)
    if expected is None:
        assert found == []
        return
    (segment,) = found
    assert (segment.task, segment.representation) == ("task", "")
    assert [seen(part) for part in segment.parts] == expected


def test_alternatives_are_drawn_evenly_and_each_by_itself() -> None:
    settings = settings_of(parts=[["image", "audio"], ["title", "text"]])
    of = sample(image(), audio(1), text(5, name="title"), text(6))
    ways = [tuple(part.item for part in segments(settings, of, seed)[0].parts) for seed in range(400)]
    for way in ((0, 2), (0, 3), (1, 2), (1, 3)):
        assert 65 < ways.count(way) < 135, way  # 100, within four standard deviations
    objective = settings.objectives["task"]
    assert set(objective.needs()) == {
        f"task of {first} and {then}" for first in ("image", "audio") for then in ("title", "text")
    }
    assert Expected(0.25, (("image", 4), ("title", 5)), 5, causal=5) in objective.expected()


def test_a_fraction_of_the_samples_is_drawn() -> None:
    settings = settings_of(fraction=0.25)
    drawn = sum(len(segments(settings, sample(text(5)), seed)) for seed in range(400))
    assert 65 < drawn < 135
    assert settings.objectives["task"].share("task") == 0.25
    assert sum(expected.count for expected in settings.objectives["task"].expected()) == 0.25


def test_counts_are_of_the_targets() -> None:
    settings = settings_of()
    samples = [sample(text(5, 6), image()), sample(text(7, loss=False), text(8), document=True), sample(image())]
    assert settings.objectives["task"].counts(pack(samples, settings)) == {"task": 3 + 2}
    assert settings.objectives["task"].counts(pack([], settings)) == {"task": 0}


SPOKEN = [("de", text(5, 6)), ("nl", text(7)), ("de", text(8)), ("", text(9, 9, 9))]  # 3, 2, 2 and 4 targets


def spoken() -> list[Sample]:
    return [Sample(SampleMeta(f"s{i}", language=language), (item,)) for i, (language, item) in enumerate(SPOKEN)]


@pytest.mark.parametrize(
    ("balance", "counts"),
    [
        ({"language": ["de", "nl"]}, {"task/de": 5, "task/nl": 2}),
        ({"language": ["nl", "fr", "other"]}, {"task/nl": 2, "task/fr": 0, "task/other": 9}),
    ],
)
def test_values_of_a_field_count_equally(balance: dict[str, Any], counts: dict[str, int]) -> None:
    """The mean over the groups of the mean over a group's targets in the step, of two microbatches."""
    config = tiny_config(Path("unused"), **values_of(task={"balance": balance}))
    model, settings = PretrainingModel(config), pack_settings(config)
    batches = [pack(samples, settings) for samples in (spoken()[:3], spoken()[3:], [])]
    of_step = step_counts(batches, model.objectives, None, torch.device("cpu"))
    assert of_step.terms == counts and model.objectives.weights(0) == dict.fromkeys(counts, 1 / len(counts))
    sums = dict.fromkeys(counts, 0.0)
    losses = dict.fromkeys(counts, 0.0)
    model.begin_step(0, of_step)
    for batch in batches:
        for loss, value in model(batch)[1].losses.items():
            if loss in losses:
                losses[loss] += value.item()
        x_nD, _ = model.mmmoe.run_stage(batch, None)
        nll = iter(model.mmmoe.heads(x_nD, batch).token_nll["task"].tolist())
        for meta, (_, item) in zip(batch.metas, (SPOKEN[int(meta.key[1])] for meta in batch.metas), strict=True):
            language = f"task/{meta.language}" if f"task/{meta.language}" in counts else "task/other"
            own = sum(next(nll) for _ in item.value[1:])
            sums[language] = sums.get(language, 0.0) + own
    expected = {loss: sums[loss] / max(1, count) / len(counts) for loss, count in counts.items()}
    assert losses == pytest.approx(expected, rel=1e-5)


def test_modalities_with_a_loss_count_equally() -> None:
    settings = settings_of(balance="modality", loss_on=["title", "text"])
    task = settings.objectives["task"]
    samples = [sample(text(5, 6, 7), text(5, name="title")), sample(text(8, name="title")), sample(image())]
    assert task.losses == {"task/title": 0.5, "task/text": 0.5}
    assert task.counts(pack(samples, settings)) == {"task/title": 2 + 2, "task/text": 4}
    assert task.counts(pack([], settings)) == {"task/title": 0, "task/text": 0}
    assert "has text, or title, as modality title, which is in its balance" in task.why_idle("task/title", 0, "yet")


def test_a_token_sees_what_stands_before_it_and_nothing_after() -> None:
    """In a document: another last text changes no earlier token's loss, another image those of all tokens after."""
    config = tiny_config(Path("unused"), **values_of(task={}))
    model = PretrainingModel(config).eval()

    def nll(second: Item, last: Item) -> torch.Tensor:
        page = sample(text(5, 6), second, text(7, 8), last, document=True)
        with torch.no_grad():
            return model.mmmoe(pack([page], pack_settings(config)))[0].token_nll["task"]

    white = Item("image", np.full((3, 16, 16), 255, np.uint8))
    base, other_end, other_image = nll(image(), text(9)), nll(image(), text(10)), nll(white, text(9))
    torch.testing.assert_close(base[:6], other_end[:6])
    assert not torch.isclose(base[6:], other_end[6:]).any()
    torch.testing.assert_close(base[:3], other_image[:3])
    assert not torch.isclose(base[3:], other_image[3:]).any()


def test_two_tasks_share_the_head_and_keep_their_targets_apart() -> None:
    config = tiny_config(Path("unused"), **values_of(captions=CAPTIONED, reading={"weight": 0.5}))
    model, settings = PretrainingModel(config), pack_settings(config)
    batch = pack([sample(image(), text(5, 6)), sample(text(7))], settings)
    assert {task: targets.ids.tolist() for task, targets in batch.targets.items()} == {
        "captions": [5, 6, 2], "reading": [5, 6, 2, 7, 2]}  # fmt: skip
    assert batch.task_ids.tolist() == [0, 1, 1]
    loss, report = model(batch)
    loss.backward()
    assert {name for name, _ in model.named_parameters() if "head" in name} == {"mmmoe.language_head.weight"}
    with torch.no_grad():
        nll = model.mmmoe(batch)[0].token_nll
    expected = {"captions": nll["captions"].mean().item(), "reading": 0.5 * nll["reading"].mean().item()}
    assert {task: report.losses[task].item() for task in expected} == pytest.approx(expected)


def test_weights_follow_their_schedule() -> None:
    config = tiny_config(
        Path("unused"), **values_of(task={}, later={"weight": [[10, 0.0], [20, 1.0], [30, 0.5]]}, off={"weight": 0})
    )
    assert config.stream_names.tasks == ("task", "later")
    objectives = pack_settings(config).objectives
    at = [0, 10, 15, 20, 25, 30, 1000]
    assert [objectives.weights(step)["later"] for step in at] == pytest.approx([0, 0, 0.5, 1, 0.75, 0.5, 0.5])
    assert {objectives.weights(step)["task"] for step in at} == {1.0}
    model = PretrainingModel(config)
    batch = pack([sample(text(5, 6))], pack_settings(config))
    found = []
    for step in (10, 15, 20):
        model.begin_step(step)
        found.append(model(batch)[1].losses["later"].item())
    assert found == pytest.approx([0, found[2] / 2, found[2]]) and found[2] > 0


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"parts": ["video", "text"]}, ["task", "video", "image, audio, title, text", "parts"]),
        ({"loss_on": ["sound"]}, ["task", "sound", "loss_on"]),
        ({"parts": ["image", "text"], "loss_on": ["title"]}, ["loss_on title", "text"]),
        ({"parts": ["image", "text"], "loss_on": ["image"]}, ["loss_on image", "text"]),
        ({"parts": [["image", "audio"]]}, ["predicts nothing", "audio, image", "kind: text"]),
        ({"parts": ["text", ["image", "text"]]}, ["text", "twice"]),
        ({"parts": [[], "text"]}, ["parts", "nothing in a list"]),
        ({"balance": "modality", "parts": ["image", "text"]}, ["text alone", "{language: [en, de, other]}"]),
        ({"balance": {"language": ["de"]}}, ["language ['de']", "two values or more", "other stands for"]),
        ({"balance": {"language": ["de", "d/e"]}}, ["'d/e'", "letters, digits, _ and -"]),
        ({"fraction": 0.0}, ["task.fraction", "greater than 0"]),
        ({"weight": [[5, 1.0], [5, 0.0]]}, ["weight", "[[0, 0.0], [1000, 0.25]]"]),
        ({"weight": []}, ["weight", "[[0, 0.0], [1000, 0.25]]"]),
        ({"weight": -1.0}, ["weight -1.0", "number from 0 on"]),
    ],
)
def test_wrong_settings_are_refused_with_values_and_remedy(task: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        settings_of(**task)
    for word in words:
        assert word in str(error.value), word
