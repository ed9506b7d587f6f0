"""Masked modelling: which tokens lose their content, that nothing of it reaches the model, and the losses by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.batch import IGNORE, Contents, Item, Sample, SampleMeta, Seen, Spans
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.models.attention import EPS
from mmmoe_pretrain.models.costs import decoder_flops
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.objectives.masked import squared_errors
from tests.support import pack_settings, random_sample, tiny_config

KINDS = {
    "image": {"kind": "image", "size": 16, "patch": 4, "stem_channels": 4},  # 16 tokens
    "audio": {"kind": "audio", "n_mels": 8, "patch": 2, "max_seconds": 0.1},
    "text": {"kind": "text", "max_tokens": 40},
}


def values_of(**task: Any) -> dict[str, Any]:
    return {"modalities": KINDS, "objectives": {"masked": {"kind": "masked", **task}}}


def settings_of(**task: Any) -> PackSettings:
    return pack_settings(tiny_config(Path("unused"), **values_of(**task)))


def image(seed: int = 0) -> Item:
    return Item("image", np.random.default_rng(seed).integers(0, 256, (3, 16, 16), dtype=np.uint8))


def text(*ids: int, loss: bool = True) -> Item:
    return Item("text", np.asarray([1, *ids, 2]), loss=loss)


def sample(*items: Item) -> Sample:
    return Sample(SampleMeta("a"), items)


def parts_of(settings: PackSettings, of: Sample, seed: int = 0) -> list[Any]:
    found = list(settings.objectives["masked"].segments(of, np.random.default_rng(seed)))
    assert len(found) <= 1
    return list(found[0].parts) if found else []


def test_pieces_are_hidden_and_never_the_marks() -> None:
    settings = settings_of(hidden={"text": 0.5})
    hidden_of = []
    for seed in range(200):
        (part,) = parts_of(settings, sample(text(*range(10, 20))), seed)
        assert part.hidden.sum() == 5 and not part.hidden[[0, -1]].any()
        expected = np.asarray([1, *range(10, 20), 2])
        np.testing.assert_array_equal(part.targets, np.where(part.hidden, expected, IGNORE))
        np.testing.assert_array_equal(part.view, np.where(part.hidden, 0, expected))
        hidden_of.append(part.hidden)
    # Each of ten pieces is hidden in half of 200 draws: within 4 standard deviations, sqrt(200)/2, of 100.
    assert (np.abs(np.sum(hidden_of, axis=0)[1:-1] - 100) < 4 * 7.1).all()


def test_the_share_holds_in_the_mean_and_one_token_is_hidden_at_least() -> None:
    settings = settings_of(hidden={"text": 0.15})
    counts = [parts_of(settings, sample(text(5, 6, 7)), seed)[0].hidden.sum() for seed in range(20)]
    assert counts == [1] * 20  # 0.45 pieces in the mean, and never none
    of_ten = [parts_of(settings, sample(text(*range(10, 20))), seed)[0].hidden.sum() for seed in range(400)]
    assert set(of_ten) == {1, 2} and np.mean(of_ten) == pytest.approx(1.5, abs=0.1)  # 4 standard deviations


def test_spans_hide_consecutive_tokens() -> None:
    settings = settings_of(hidden={"image": 0.5}, span={"image": 4})
    starts = set()
    for seed in range(50):
        hidden = parts_of(settings, sample(image()), seed)[0].hidden
        assert hidden.sum() == 8
        changes = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
        assert len(changes) <= 2 * 4  # two whole spans of four, and at most two that are cut
        starts.add(changes[0])
    assert len(starts) > 4


def test_a_part_without_a_share_is_seen_whole() -> None:
    settings = settings_of(hidden={"text": 1.0}, parts=["image", "text"])
    seen, hidden = parts_of(settings, sample(text(5), image()))
    assert (seen.item, seen.view, seen.hidden, seen.contents) == (1, None, None, None)
    assert hidden.item == 0 and hidden.hidden.tolist() == [False, True, False]
    assert parts_of(settings, sample(text(5))) == []
    assert parts_of(settings, sample(text(5, loss=False), image())) == []


def test_with_missing_allow_a_segment_has_the_parts_that_are_there() -> None:
    settings = settings_of(hidden={"text": 0.5, "image": 0.5}, missing="allow")
    assert [part.item for part in parts_of(settings, sample(image()))] == [0]
    assert [part.item for part in parts_of(settings, sample(image(), text(5)))] == [1, 0]
    settings = settings_of(hidden={"text": 0.5}, parts=["image", "text"], missing="allow")
    assert parts_of(settings, sample(image())) == []  # nothing to predict


def test_with_a_decoder_hidden_tokens_are_not_in_the_stream() -> None:
    settings = settings_of(hidden={"image": 0.5}, parts=["image", "text"], decoder_layers=1)
    one = sample(image(), text(5, 6))
    (segment,) = settings.objectives["masked"].segments(one, np.random.default_rng(0))
    (left,), whole = segment.left_out, segment.parts[-1]
    assert (whole.item, len(whole), whole.view) == (1, 4, None)
    seen = [number for part in segment.parts[:-1] for number in range(part.start, part.stop)]
    assert sorted([*seen, *left.numbers.tolist()]) == list(range(16)) and len(left.numbers) == 8
    assert all(part.first_position == part.start and part.hidden is None for part in segment.parts[:-1])
    contents = settings.modalities["image"].contents(one.items[0].value)
    np.testing.assert_array_equal(left.contents, contents[left.numbers])
    same_draws = dataclasses.replace(settings, generator=lambda position, purpose: np.random.default_rng(0))
    batch = pack([sample(), one, one], same_draws)
    assert batch.num_valid == 2 * (8 + 4) and not batch.hidden.any()
    assert batch.keys[:12].tolist() == [*seen, 1, 5, 6, 2]
    found = batch.contents["masked/image"]
    assert found.rows.tolist() == left.numbers.tolist() * 2
    assert found.seen == Seen((8, 8), Spans((0, 12), (12, 12)))


def test_a_decoder_sees_one_token_at_least() -> None:
    settings = settings_of(hidden={"image": 1.0}, decoder_layers=1)
    (part,) = parts_of(settings, sample(image()))
    assert len(part) == 1
    settings = settings_of(hidden={"image": 1.0}, parts=["image", "text"], missing="allow", decoder_layers=1)
    assert [part.item for part in parts_of(settings, sample(image(), text(5)))] == [1]
    assert parts_of(settings, sample(image())) == []


def test_a_decoder_by_hand() -> None:
    """Each place attends to the tokens of its own segment: one block and its head, written out in float64."""
    config = tiny_config(Path("unused"), **values_of(hidden={"image": 0.5, "audio": 0.5}, decoder_layers=1))
    size, heads = config.model.hidden_size, config.model.num_heads
    decoder = PretrainingModel(config).mmmoe.content_decoders["masked"].double()
    x = torch.randn(9, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, spans = torch.tensor([3, 0, 2]), Spans((0, 0, 5), (3, 0, 4))
    contents = Contents(rows, torch.zeros(3, 48), Seen((1, 0, 2), spans))
    with torch.no_grad():
        found = decoder(x, "image", contents)
        block, part = decoder.blocks[0], decoder.parts["image"]

        def unit(values: torch.Tensor) -> torch.Tensor:
            return values / (values.square().mean(-1, keepdim=True) + EPS).sqrt()

        for i, (place, tokens) in enumerate(((3, x[:3]), (0, x[5:]), (2, x[5:]))):
            query = part.positions[place]
            q, k, v = block.query(unit(query)), block.key(unit(tokens)), block.value(unit(tokens))
            q, k, v = (values.unflatten(-1, (heads, -1)) for values in (q, k, v))
            weights = torch.einsum("hd,nhd->hn", unit(q), unit(k)) / (size // heads) ** 0.5
            query = query + block.out(torch.einsum("hn,nhd->hd", weights.softmax(-1), v).flatten())
            query = query + block.down(torch.nn.functional.gelu(block.up(unit(query))))
            torch.testing.assert_close(found[i], part.head(unit(query)))


def test_the_flops_of_a_decoder_are_those_of_its_products() -> None:
    config = tiny_config(
        Path("unused"), **values_of(hidden={"image": 0.5}, parts=["image", "text"], decoder_layers=2)
    )
    settings, model = pack_settings(config), PretrainingModel(config).mmmoe
    batch = pack([sample(image(), text(*range(5, 45)))], settings)
    meta, size = torch.device("meta"), config.model.hidden_size
    contents = batch.to(meta).contents["masked/image"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.zeros(batch.num_valid, size, device=meta)
        model.content_decoders["masked"].to(meta)(x, "image", contents)
    head = 2 * size * contents.values.numel()
    assert decoder_flops(settings.objectives["masked"], size) == counter.get_total_flops() - head


def test_nothing_of_what_is_left_out_reaches_the_model() -> None:
    """The stem looks at neighbours."""
    config = tiny_config(
        Path("unused"), **values_of(hidden={"image": 0.5}, parts=["image", "text"], decoder_layers=1)
    )
    settings, model = pack_settings(config), PretrainingModel(config)
    same_draws = dataclasses.replace(settings, generator=lambda position, purpose: np.random.default_rng(0))
    one = sample(image(), text(5, 6, 7, 8))
    numbers = pack([one], same_draws).contents["masked/image"].rows.numpy()
    pixels = np.isin(np.arange(16), numbers).reshape(4, 4).repeat(4, 0).repeat(4, 1)
    other = sample(Item("image", np.where(pixels, 255 - one.items[0].value, one.items[0].value)), one.items[1])
    batches = [pack([each], same_draws) for each in (one, other)]
    with torch.no_grad():
        states = [model.mmmoe(batch)[0] for batch in batches]
        losses = [model(batch)[1].losses["masked/image"] for batch in batches]
    torch.testing.assert_close(states[0].hidden_nD, states[1].hidden_nD, rtol=0, atol=0)
    torch.testing.assert_close(states[0].contents["masked/image"], states[1].contents["masked/image"], rtol=0, atol=0)
    assert losses[0] != losses[1]


def test_nothing_of_what_is_hidden_reaches_the_model() -> None:
    config = tiny_config(Path("unused"), **values_of(hidden={"image": 0.5, "text": 0.5}))
    settings, model = pack_settings(config), PretrainingModel(config)
    one = sample(image(), text(5, 6, 7, 8))
    (image_part, text_part) = parts_of(settings, one, 0)
    pixels = image_part.hidden.reshape(4, 4).repeat(4, 0).repeat(4, 1)
    other_image = Item("image", np.where(pixels, 255 - one.items[0].value, one.items[0].value))
    other = dataclasses.replace(
        one, items=(other_image, text(*np.where(text_part.hidden, 40, one.items[1].value)[1:-1]))
    )
    batches = []
    for each in (one, other):
        same_draws = dataclasses.replace(settings, generator=lambda position, purpose: np.random.default_rng(0))
        batches.append(pack([each], same_draws))
    with torch.no_grad():
        states = [model.mmmoe(batch)[0] for batch in batches]
        losses = [model(batch)[1].losses for batch in batches]
    torch.testing.assert_close(states[0].hidden_nD, states[1].hidden_nD, rtol=0, atol=0)
    assert losses[0]["masked/image"] != losses[1]["masked/image"]
    assert losses[0]["masked/text"] != losses[1]["masked/text"]


def test_hidden_tokens_get_the_vector_of_their_modality_at_their_place() -> None:
    config = tiny_config(Path("unused"), **values_of(hidden={"text": 0.5}))
    model, settings = PretrainingModel(config).mmmoe, pack_settings(config)
    assert list(model.mask_embedding) == ["text"] and not model.content_heads
    batch = pack([random_sample(0, "t", config)], settings)
    embedded = []
    model.trunk.register_forward_pre_hook(lambda module, given: embedded.append(given[0]))
    model(batch)
    with torch.no_grad():
        model.mask_embedding["text"].zero_()
    model(batch)
    changed = (embedded[0] != embedded[1]).any(dim=1)
    assert changed.tolist() == batch.hidden[: len(changed)].tolist() and changed.any() and not changed.all()


def test_squared_errors_by_hand() -> None:
    nan = float("nan")
    values = torch.tensor([[1.0, 3.0, nan], [5.0, 5.0, 5.0]])
    predicted = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 0.0]])
    contents = Contents(torch.tensor([0, 1]), values)
    plain = squared_errors(predicted, contents, normalize=False)
    torch.testing.assert_close(plain, torch.tensor([(1 + 4) / 2, (16 + 25 + 25) / 3]))
    # The first has mean 2 and deviation 1: -1 and 1 are expected; the second is constant: zeros.
    normalized = squared_errors(predicted, contents, normalize=True)
    torch.testing.assert_close(normalized, torch.tensor([(1 + 0) / 2, 1 / 3]))


def test_losses_are_means_over_the_hidden_tokens_of_each_modality() -> None:
    config = tiny_config(
        Path("unused"), **values_of(hidden={"image": 0.5, "text": 0.5}, weights={"image": 3.0}, missing="allow")
    )
    model, settings = PretrainingModel(config), pack_settings(config)
    batch = pack([random_sample(i, has, config) for i, has in enumerate(("it", "t", "i", ""))], settings)
    counts = step_counts([batch], model.objectives, None, torch.device("cpu"))
    hidden = batch.hidden & (batch.modality_ids == 0)
    assert counts.terms == {"masked/image": 16, "masked/text": int(batch.hidden.sum() - hidden.sum())}
    with torch.no_grad():
        outputs, _ = model.mmmoe(batch)
        losses = model(batch)[1].losses
    image_rows = outputs.hidden_nD[torch.nonzero(hidden[: len(outputs.hidden_nD)])[:, 0]]
    errors = squared_errors(model.mmmoe.content_heads["image"](image_rows), batch.contents["masked/image"], True)
    torch.testing.assert_close(losses["masked/image"], 3.0 * errors.mean())
    torch.testing.assert_close(losses["masked/text"], outputs.token_nll["masked"].mean())


@pytest.mark.parametrize("decoder_layers", [0, 2])
def test_a_batch_without_hidden_tokens_gives_every_parameter_a_gradient_of_zeros(decoder_layers: int) -> None:
    hidden = {"image": 0.5, "audio": 0.5, **({} if decoder_layers else {"text": 0.5})}
    config = tiny_config(Path("unused"), **values_of(hidden=hidden, decoder_layers=decoder_layers))
    model = PretrainingModel(config)
    loss, report = model(pack([random_sample(0, "", config)], pack_settings(config)))
    loss.backward()
    assert {name: float(value) for name, value in report.losses.items() if "masked" in name} == {
        f"masked/{name}": 0 for name in hidden
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ({"hidden": {"smell": 0.5}}, "names smell, and the modalities are image, audio, text"),
        ({"hidden": {}}, "at least 1 item"),
        ({"hidden": {"text": 0}}, "greater than 0"),
        ({"hidden": {"text": 0.5}, "parts": ["image"]}, "hidden names text, and its parts are image"),
        ({"hidden": {"text": 0.5}, "parts": ["text", "text"]}, "twice"),
        ({"hidden": {"text": 0.5}, "span": {"image": 2}}, "span names image"),
        ({"hidden": {"text": 0.5}, "weights": {"image": 2}}, "weights names image"),
        ({"hidden": {"text": 0.5}, "weights": {"text": 0}}, "none of masked has a weight"),
        (
            {"hidden": {"text": 0.5}, "decoder_layers": 1},
            "decoder_layers 1 with hidden text: a decoder predicts numbers",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(task: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_config(Path("unused"), **values_of(**task))


def test_a_decoder_needs_tokens_at_fixed_places() -> None:
    native = {"kind": "image", "size": 16, "patch": 4, "stem": "linear", "aspect": "native", "max_tokens": 16}
    values = values_of(hidden={"image": 0.5}, decoder_layers=1)
    config = tiny_config(Path("unused"), **{**values, "modalities": {**KINDS, "image": native}})
    with pytest.raises(ValueError, match="values of image have places of their own; set modalities"):
        PretrainingModel(config)
