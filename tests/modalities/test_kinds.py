"""For every kind of modality: the host side and the embedder agree, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import ModalitySettings
from mmmoe_pretrain.data.sources.members import dotted_key
from mmmoe_pretrain.modalities import Modality, build_modalities, default_modalities, format_of, reads
from tests.support import tiny_config

VOCAB, HIDDEN = 48, 12
SMALL: dict[str, dict[str, Any]] = {  # settings of kinds that have none that fit, or are slow as they are
    "image": {"size": 16, "stem_channels": 8},
    "audio": {"n_mels": 40, "max_seconds": 0.5, "stem_channels": 8},
    "series": {"channels": 3, "max_steps": 100},
    "image_codes": {"tokenizer": "codes.npz", "codes": 30, "max_tokens": 12},  # which is read to decode alone
    "audio_codes": {"tokenizer": "codes.npz", "codes": 30, "max_tokens": 12},
}
STEMS = [
    {"stem": "linear", "positions": "rotary", "patch": 2},
    {"stem": "linear", "positions": "learned", "patch": 8},
    {"stem": "conv", "positions": "learned", "patch": 2},
    {"stem": "conv", "positions": "rotary", "patch": 8},
]
CHANGES: dict[str, list[dict[str, Any]]] = {
    "image": [*STEMS, {"aspect": "native", "stem": "linear", "max_tokens": 12}],
    "audio": [*STEMS, {"patch": 1}],
}  # fmt: skip
OTHERS = [{"positions": "learned"}, {"positions": "rotary"}]
VARIANTS = [
    {"kind": kind, **SMALL.get(kind, {}), **changes}
    for kind in kinds.MODALITIES.names
    for changes in CHANGES.get(kind, OTHERS)
]


@pytest.fixture(params=VARIANTS, ids=str)
def modality(request: pytest.FixtureRequest, tiny_data: Path) -> Modality:
    values = request.param
    settings: ModalitySettings = kinds.MODALITIES.load(values["kind"]).Settings(**values)
    return build_modalities({"mine": settings}, tiny_data / "tokens.model")["mine"]


def examples(modality: Modality, count: int) -> list[np.ndarray]:
    return [modality.example(np.random.default_rng(seed), VOCAB) for seed in range(count)]


def embed(modality: Modality, module: torch.nn.Module, values: list[np.ndarray]) -> torch.Tensor:
    arrays = modality.collate(values).arrays
    return module(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def test_an_example_has_as_many_tokens_as_the_embedder_gives_rows(modality: Modality) -> None:
    torch.manual_seed(0)
    module = modality.embedder(HIDDEN, VOCAB)
    values = examples(modality, 4)
    for value in values:
        count = modality.num_tokens(value)
        assert 1 <= count <= modality.max_tokens
        assert embed(modality, module, [value]).shape == (count, HIDDEN)
        keys = modality.keys(value)
        assert keys.shape == (count,) and keys.dtype == np.int64
        assert keys.max() < (VOCAB if modality.predictable else count)
    together, starts = embed(modality, module, values), modality.collate(values).starts
    for start, value in zip(starts, values, strict=True):  # padding in between belongs to no value
        alone = embed(modality, module, [value])
        torch.testing.assert_close(together[start : start + len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_of_no_value_there_are_no_rows_and_every_parameter_gets_a_gradient_of_zeros(modality: Modality) -> None:
    module = modality.embedder(HIDDEN, VOCAB)
    assert modality.collate([]).starts.shape == (0,)
    rows = embed(modality, module, [])
    assert rows.shape == (0, HIDDEN)
    rows.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_token_is_described_in_a_report(modality: Modality) -> None:
    for value in examples(modality, 2):
        for token in range(modality.num_tokens(value)):
            assert modality.describe(value, token)
            excerpt = modality.excerpt(value, token)
            assert excerpt is None or (len(excerpt) == 3 and excerpt[1])
            shown = modality.draw(value, token)
            if shown is not None:
                image, (left, top, right, bottom) = shown
                assert image.width and image.height
                assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def test_a_format_is_of_one_kind() -> None:
    formats = [ending for kind in kinds.MODALITIES.names for ending in reads(kind).formats]
    assert len(formats) == len(set(formats))
    for kind in kinds.MODALITIES.names:
        for ending in reads(kind).formats:
            assert format_of(f"left.{ending}") == format_of(ending) == kind
    assert format_of("doc") is None and format_of("") is None
    need_settings = {"series", "image_codes", "audio_codes"}  # of channels, or a file
    assert set(default_modalities()) == kinds.MODALITIES.builtin.keys() - need_settings


def test_a_package_that_cannot_be_loaded_stops_only_what_names_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_installed", lambda group: {"broken": "no_such_package:Broken"})
    assert format_of("left.png") == "image" and dotted_key(("0.csv", "1.csv", "json")) == ()
    assert list(build_modalities(tiny_config(Path("unused")).modalities, decoding=False)) == [
        "image",
        "audio",
        "text",
    ]
    assert format_of("left.never_seen") is None  # a warning, and no error
    with pytest.raises(ValueError, match="modality kind broken cannot be loaded from no_such_package:Broken"):
        tiny_config(Path("unused"), modalities={"clouds": {"kind": "broken"}})


def test_a_modality_that_reads_text_needs_a_tokenizer(tiny_data: Path) -> None:
    settings = {"words": kinds.MODALITIES.load("text").Settings()}
    with pytest.raises(ValueError, match=r"modalities\.words reads text, and data\.tokenizer names no tokenizer"):
        build_modalities(settings)
    with pytest.raises(ValueError, match="fingerprint"):
        build_modalities(settings, tiny_data / "tokens.model", fingerprint="another")
    built = build_modalities(settings, tiny_data / "tokens.model")
    hash_of_file = xxhash.xxh3_128_hexdigest((tiny_data / "tokens.model").read_bytes())
    assert (built.vocab_size, built.fingerprint) == (VOCAB, hash_of_file)
    without = build_modalities({"left": kinds.MODALITIES.load("image").Settings()})
    assert (without.vocab_size, without.fingerprint, without.predictable) == (0, "", ())
    with pytest.raises(ValueError, match=r"no modality reads text \(left\)"):
        _ = without.tokenizer


def test_what_is_hidden_leaves_no_trace_and_the_rest_is_as_it_was(modality: Modality) -> None:
    if not modality.hideable:
        pytest.skip("its tokens cannot be hidden")
    for value in examples(modality, 3):
        may_hide = modality.may_hide(value)
        hidden = np.zeros(modality.num_tokens(value), dtype=bool)
        hidden[may_hide[::2]] = True
        seen, before = modality.hide(value, hidden), value.copy()
        shown = modality.keys if modality.predictable else modality.contents
        np.testing.assert_array_equal(value, before)
        assert seen.dtype == value.dtype and modality.num_tokens(seen) == modality.num_tokens(value)
        np.testing.assert_array_equal(shown(seen)[~hidden], shown(value)[~hidden])
        assert (hidden.any() and hidden.sum() == len(may_hide[::2])) or not len(may_hide)
        traces = shown(seen)[hidden]
        np.testing.assert_array_equal(traces, np.broadcast_to(traces[:1], traces.shape))


def test_contents_are_the_numbers_that_a_linear_stem_multiplies(modality: Modality) -> None:
    if modality.predictable or not modality.hideable:
        pytest.skip("it has no contents")
    if getattr(modality.settings, "stem", "linear") != "linear" or not modality.rotary:
        pytest.skip("its rows are not a product with its contents alone")
    module = modality.embedder(HIDDEN, VOCAB)
    values = examples(modality, 2)
    contents = np.concatenate([modality.contents(value) for value in values])
    assert contents.dtype == np.float32 and contents.shape[1] == modality.content_size
    product = module.get_submodule("stem" if hasattr(module, "stem") else "project")
    weight, bias = (product.get_parameter(name) for name in ("weight", "bias"))
    numbers = np.nan_to_num(contents)
    if "observed" in modality.collate(values).arrays:
        numbers = np.concatenate([numbers, np.isfinite(contents)], axis=1)
    expected = torch.from_numpy(numbers.astype(np.float32)) @ weight.flatten(1).t() + bias
    starts = modality.collate(values).starts.tolist()
    rows = embed(modality, module, values)
    found = torch.cat([rows[s : s + modality.num_tokens(v)] for s, v in zip(starts, values, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums of up to 200 products, in another order


def test_views_are_values_of_the_modality_and_a_function_of_the_generator(modality: Modality) -> None:
    module = modality.embedder(HIDDEN, VOCAB)
    for value in examples(modality, 2):
        for name, transform in modality.transforms.items():
            before = value.copy()
            view, again, other = (transform(value, np.random.default_rng(seed)) for seed in (1, 1, 2))
            np.testing.assert_array_equal(value, before, err_msg=f"{name} changes its value")
            np.testing.assert_array_equal(view, again)
            assert view.dtype == value.dtype
            assert 0 < modality.num_tokens(view) <= modality.num_tokens(value), name
            assert len(embed(modality, module, [view])) >= modality.num_tokens(view), name
            if modality.num_tokens(value) > 4:
                assert not np.array_equal(view, other) or not np.array_equal(view, value), f"{name} changes nothing"
