"""The bank of vectors in place of absent parts: every kind against its formula, in which an absent part is one token,
the vector of the sample's combination. Shapes: n tokens, B samples, P parts, D hidden size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.config.base import RepresentationSettings, representation_settings
from mmmoe_pretrain.models.fusion.bank import Bank
from tests.models.fusion.test_kinds import FORMULAS, D, Formula, made, spans_of

PARTS = ("text", "image", "audio")
# By the parts that LENGTHS gives the first four samples: all; image, text; audio; all.
LACKING = ({}, {"audio": "image-text"}, {"text": "audio", "image": "audio"}, {})


def settings_of(kind: str, parts: tuple[str, ...] = PARTS, **more: Any) -> RepresentationSettings:
    values = {"kind": kind.partition(" ")[0], "parts": list(parts), "missing": "bank", **more}
    return representation_settings(values)


def filled_bank(settings: RepresentationSettings) -> Bank:
    bank, generator = Bank(settings, D).double(), torch.Generator().manual_seed(3)
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return bank


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_kind_reads_the_vectors_of_the_combination_in_place_of_absent_parts(kind: str) -> None:
    formula: Formula
    formula, more = FORMULAS[kind]
    fusion, settings = made(kind, PARTS, **more), settings_of(kind, **more)
    bank, (spans, rows) = filled_bank(settings), spans_of(PARTS)
    x_nD = torch.tensor(np.random.default_rng(1).standard_normal((rows, D)), requires_grad=True)
    means = [
        torch.stack([x_nD[s : s + n].sum(dim=0) / max(1, n) for s, n in zip(of.starts, of.lengths, strict=True)])
        for of in spans.values()
    ]
    present_PB = torch.tensor([[n > 0 for n in of.lengths] for of in spans.values()])
    given = tuple(spans.values()) if settings.reads_tokens else ()
    tokens_nD, mean_PBD = bank(x_nD, torch.stack(means), present_PB)
    result = fusion(tokens_nD, mean_PBD, bank.present(present_PB), bank.spans(given, len(x_nD)))
    assert result.isfinite().all()  # of the last sample, too, which has nothing
    weights = {name: parameter.detach().numpy() for name, parameter in fusion.named_parameters()}
    vector = {name: parameter.detach().numpy() for name, parameter in bank.named_parameters()}
    x = x_nD.detach().numpy()
    for b, lacking in enumerate(LACKING):
        tokens = {
            name: vector[f"parts.{name}.given.{lacking[name]}"]
            if name in lacking
            else x[spans[name].starts[b] :][: spans[name].lengths[b]]
            for name in PARTS
        }
        np.testing.assert_allclose(result[b].detach().numpy(), formula(weights, tokens, PARTS), rtol=1e-9, atol=1e-10)
    (result[:4] ** 2).sum().backward()
    used = {f"parts.{name}.given.{its}" for lacking in LACKING for name, its in lacking.items()}
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None and parameter.grad.any() == (name in used), name


def test_there_is_a_vector_for_each_part_and_each_combination_of_the_others() -> None:
    four = ("image", "audio", "text", "depth")
    names = [name for name, _ in Bank(settings_of("late", four), D).named_parameters()]
    assert len(names) == 4 * (2**3 - 1)
    assert {name for name in names if name.startswith("parts.text.")} == {
        f"parts.text.given.{its}"
        for its in ("audio", "depth", "image", "audio-depth", "audio-image", "depth-image", "audio-depth-image")
    }


def test_no_sample_and_no_token_give_gradients_of_zero() -> None:
    bank = filled_bank(settings_of("latents", ("image", "audio")))
    nothing = torch.zeros(2, 0, D, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.bool)
    tokens_nD, mean_PBD = bank(torch.zeros(0, D, dtype=torch.float64), *nothing)
    assert mean_PBD.shape == (2, 0, D)
    (tokens_nD.sum() * 0 + mean_PBD.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in bank.parameters())
