"""Each kind of fusion against its formula in numpy, sample by sample: forward, and the gradient of its inputs by
finite differences of that formula.

Shapes: n tokens, B samples, P parts, D hidden size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import representation_settings
from mmmoe_pretrain.models.fusion.base import Fusion, build_fusion
from mmmoe_pretrain.objectives import objectives_of
from tests.support import objectives, tiny_config

MODEL = ModelConfig(hidden_size=8, num_heads=2)
D, HEADS, HEAD = 8, 2, 4
NAMES = ("image", "audio", "text")
# By part and sample; lengths on both sides of a bucket's 8. The second sample lacks audio, the third all but audio,
# the last everything.
LENGTHS = {"image": (3, 9, 0, 2, 0), "audio": (10, 0, 4, 9, 0), "text": (1, 2, 0, 7, 0)}
PADDING = 3  # rows that nobody reads, between the runs


def spans_of(parts: tuple[str, ...]) -> tuple[dict[str, Spans], int]:
    """Runs in the order of samples, and the rows of the stream."""
    starts: dict[str, list[int]] = {name: [] for name in parts}
    rows = PADDING
    for b in range(len(LENGTHS["image"])):
        for name in parts:
            starts[name].append(rows if LENGTHS[name][b] else 0)
            rows += LENGTHS[name][b]
        rows += PADDING
    return {name: Spans(tuple(starts[name]), LENGTHS[name]) for name in parts}, rows


def made(kind: str, parts: tuple[str, ...], **more: Any) -> Fusion:
    """With random weights, in fp64."""
    generator = torch.Generator().manual_seed(0)
    settings = representation_settings({"kind": kind.partition(" ")[0], "parts": list(parts), **more})
    fusion = build_fusion(settings, MODEL).double()
    for parameter in fusion.parameters():
        normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = normal / parameter.shape[-1] ** 0.5
    return fusion


def run(fusion: Fusion, x_nD: torch.Tensor, spans: dict[str, Spans]) -> torch.Tensor:
    means = [
        torch.stack([x_nD[s : s + n].sum(dim=0) / max(1, n) for s, n in zip(of.starts, of.lengths, strict=True)])
        for of in spans.values()
    ]
    present_PB = torch.tensor([[n > 0 for n in of.lengths] for of in spans.values()])
    return fusion(x_nD, torch.stack(means), present_PB, tuple(spans.values()))


Weights = dict[str, np.ndarray]
Tokens = dict[str, np.ndarray]  # of one sample, by part that it has


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=0))
    return e / e.sum(axis=0)


def late(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    weights = {name: math.exp(w[f"parts.{name}"].item()) for name in tokens}
    total = sum(weights.values())
    return sum((weights[name] / total * x.mean(axis=0) for name, x in tokens.items()), np.zeros(D))


def gated(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    x = np.concatenate([tokens[name].mean(axis=0) if name in tokens else np.zeros(D) for name in parts])
    z = softmax(np.array([w[f"parts.{name}.gate.weight"] @ x for name in tokens]))
    h = np.array([np.tanh(w[f"parts.{name}.value.weight"] @ tokens[name].mean(axis=0)) for name in tokens])
    return (z * h).sum(axis=0)


def outer(vectors: list[np.ndarray]) -> np.ndarray:
    """T[i, j, ...] = a[i] b[j] ..., flattened."""
    return functools.reduce(np.multiply.outer, vectors).ravel()


def tensor(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    z = [w[f"parts.{name}.weight"] @ tokens[name].mean(axis=0) if name in tokens else np.zeros(3) for name in parts]
    return outer([np.concatenate([[1.0], one]) for one in z])


def low_rank(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    """The whole tensor W, a sum over ranks of outer products of factors, times the whole tensor of [z; 1]."""
    z = [np.append(tokens[name].mean(axis=0) if name in tokens else np.zeros(D), 1.0) for name in parts]
    factors = [w[f"parts.{name}"].reshape(2, 3, D + 1) for name in parts]  # [R, W, D + 1]
    return np.array([
        sum(outer([factor[r, o] for factor in factors]) for r in range(2)) @ outer(z) for o in range(3)
    ])  # fmt: skip


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def block(w: Weights, at: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows x that attend to rows y, head by head and row by row, then the MLP."""
    mixed, y = np.zeros_like(x), unit(y)
    for h, i in itertools.product(range(HEADS), range(len(x))) if len(y) else ():
        own = slice(h * HEAD, (h + 1) * HEAD)
        q = unit(w[f"{at}query.weight"][own] @ unit(x[i]))
        scores = np.array([q @ unit(w[f"{at}key.weight"][own] @ row) for row in y]) / math.sqrt(HEAD)
        mixed[i, own] = softmax(scores) @ (y @ w[f"{at}value.weight"][own].T)
    x = x + mixed @ w[f"{at}out.weight"].T
    hidden = unit(x) @ w[f"{at}up.weight"].T
    gelu = np.vectorize(lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))))
    return x + gelu(hidden) @ w[f"{at}down.weight"].T


def latents(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    return block(w, "block.", w["latents"], np.concatenate(list(tokens.values()))).mean(axis=0)


def mult(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    found = []
    for one, other in itertools.permutations(parts, 2):
        x, y = (tokens.get(name, np.zeros((0, D))) for name in (one, other))
        found.append(block(w, f"parts.{one}.parts.{other}.", x, y).mean(axis=0) if len(x) else np.zeros(D))
    return np.concatenate(found)


def bottleneck(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    shared = w["bottlenecks"]
    for layer in range(3):
        both = {name: np.concatenate([x, shared]) for name, x in tokens.items()}
        both = {name: block(w, f"parts.{name}.{layer}.", x, x) for name, x in both.items()}
        tokens = {name: x[:-2] for name, x in both.items()}
        shared = np.mean([x[-2:] for x in both.values()], axis=0)
    return np.mean([x.mean(axis=0) for x in tokens.values()], axis=0)


def neighbours(
    tokens: Tokens, edges: tuple[str, ...], most: int, grid: Mapping[str, int] = {}
) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of a sample, and A[i, j]: node i receives from node j; node by node."""
    x, of = np.concatenate(list(tokens.values())), [name for name, its in tokens.items() for _ in its]
    count = len(x)
    nodes = [*x, *(its.mean(axis=0) for its in tokens.values())] if "modality" in edges else [*x]
    adjacent = np.eye(len(nodes))
    for i, j in itertools.permutations(range(len(nodes)), 2):
        if i < count and j < count and of[i] == of[j]:
            if of[i] not in grid:
                adjacent[i, j] = "time" in edges and abs(i - j) == 1
            else:  # rows of a grid
                (row_i, column_i), (row_j, column_j) = (divmod(n - of.index(of[i]), grid[of[i]]) for n in (i, j))
                adjacent[i, j] = abs(row_i - row_j) + abs(column_i - column_j) == 1
        if max(i, j) >= count:
            hubs = list(tokens)
            belongs = min(i, j) < count and of[min(i, j)] == hubs[max(i, j) - count]
            adjacent[i, j] = belongs or min(i, j) >= count
    for i in range(count if "similarity" in edges else 0):
        cosine = x @ x[i] / np.linalg.norm(x, axis=1)
        for j in sorted((j for j in range(count) if of[j] != of[i]), key=lambda j: -cosine[j])[:most]:
            adjacent[i, j] = 1
    return np.array(nodes), adjacent


def gcn(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    """elu(D^-1/2 A D^-1/2 X W) W' ..., with dense matrices."""
    x, adjacent = neighbours(tokens, ("time", "similarity", "modality"), most=3, grid=GRID)
    scale = np.diag(adjacent.sum(axis=1) ** -0.5)
    x = scale @ adjacent @ scale @ x @ w["layers.0.linear.weight"].T
    x = np.where(x > 0, x, np.expm1(x))
    return (scale @ adjacent @ scale @ x @ w["layers.1.linear.weight"].T).mean(axis=0)


def gat(w: Weights, tokens: Tokens, parts: tuple[str, ...]) -> np.ndarray:
    """a_ij = softmax over j of leaky_relu(a . [h_i; h_j]), by head; arXiv 1710.10903, equations 1 to 5."""
    x, adjacent = neighbours(tokens, ("similarity",), most=2)
    h, out = x @ w["layers.0.linear.weight"].T, np.zeros_like(x)
    for head, i in itertools.product(range(HEADS), range(len(x))):
        own, sources = slice(head * HEAD, (head + 1) * HEAD), np.flatnonzero(adjacent[i])
        e = h[sources][:, own] @ w["layers.0.of_source"][head] + h[i, own] @ w["layers.0.of_target"][head]
        out[i, own] = softmax(np.where(e > 0, e, 0.2 * e)) @ h[sources][:, own]
    return out.mean(axis=0)


GRID = {"image": 2}  # tokens in a row
Formula = Callable[[Weights, Tokens, tuple[str, ...]], np.ndarray]
FORMULAS: dict[str, tuple[Formula, dict[str, Any]]] = {
    "late": (late, {}),
    "gated": (gated, {}),
    "tensor": (tensor, {"size": 3}),
    "low_rank": (low_rank, {"rank": 2, "size": 3}),
    "latents": (latents, {"num_latents": 3}),
    "mult": (mult, {}),
    "bottleneck": (bottleneck, {"num_bottlenecks": 2, "num_layers": 3}),
    "graph gcn": (
        gcn,
        {"layer": "gcn", "edges": ["time", "similarity", "modality", "space"], "neighbours": 3, "grid": GRID},
    ),
    "graph gat": (gat, {"edges": ["similarity"], "neighbours": 2, "num_layers": 1}),
}


@pytest.mark.parametrize("parts", [("image", "audio"), ("audio", "text", "image")], ids=["two", "three"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_kind_is_its_formula_and_has_its_gradient(kind: str, parts: tuple[str, ...]) -> None:
    """In fp64; central differences of step 1e-5 are within 1e-9 of the derivative, relative to numbers near 1."""
    formula, settings = FORMULAS[kind]
    fusion = made(kind, parts, **settings)
    weights = {name: parameter.detach().numpy() for name, parameter in fusion.named_parameters()}
    spans, rows = spans_of(parts)
    rng = np.random.default_rng(1)
    x_nD = rng.standard_normal((rows, D))
    leaf = torch.tensor(x_nD, requires_grad=True)
    result = run(fusion, leaf, spans)
    assert result.shape == (5, fusion.width) and result.isfinite().all()

    def of_sample(x_nD: np.ndarray, b: int) -> np.ndarray:
        tokens = {name: x_nD[of.starts[b] :][: of.lengths[b]] for name, of in spans.items() if of.lengths[b]}
        return formula(weights, tokens, parts)

    some = [b for b in range(4) if any(of.lengths[b] for of in spans.values())]
    for b in some:
        np.testing.assert_allclose(result[b].detach().numpy(), of_sample(x_nD, b), rtol=1e-9, atol=1e-10)
    cotangent = rng.standard_normal((4, fusion.width))
    (result[:4] * torch.tensor(cotangent)).sum().backward()
    grad = leaf.grad
    assert grad is not None
    for b in some:
        for of in spans.values():
            for row in range(of.starts[b], of.starts[b] + min(2, of.lengths[b])):
                for column in (0, 5):
                    step = np.zeros_like(x_nD)
                    step[row, column] = 1e-5
                    slope = (of_sample(x_nD + step, b) - of_sample(x_nD - step, b)) @ cotangent[b] / 2e-5
                    assert grad[row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-8), (b, row, column)
    unread = [row for row in range(rows) if not any(
        s <= row < s + n for of in spans.values() for s, n in zip(of.starts, of.lengths, strict=True))]  # fmt: skip
    assert not grad[unread].any() and len(unread) == PADDING * 6


@pytest.mark.parametrize("kind", ["early", *FORMULAS])
@pytest.mark.parametrize("samples", [0, 2], ids=["no sample", "no token"])
def test_every_parameter_has_a_gradient_without_anything_to_fuse(kind: str, samples: int) -> None:
    fusion = made(kind, ("image", "audio"), **FORMULAS.get(kind, (None, {}))[1])
    x_nD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    nothing = Spans((0,) * samples, (0,) * samples)
    mean_PBD, present_PB = torch.zeros(2, samples, D, dtype=torch.float64), torch.zeros(2, samples, dtype=torch.bool)
    result = fusion(x_nD, mean_PBD, present_PB, (nothing, nothing))
    assert result.shape == (samples, fusion.width)
    if kind != "early":
        (result.sum() * 0).backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_gates_of_two_parts_are_those_of_the_paper() -> None:
    """z = sigmoid(W_z [x_v; x_t]), h = z * tanh(W_v x_v) + (1 - z) * tanh(W_t x_t): arXiv 1702.01992, section 3."""
    fusion = made("gated", ("image", "audio"))
    w = {name: parameter.detach() for name, parameter in fusion.named_parameters()}
    v, t = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = fusion(torch.zeros(0, D), torch.stack([v, t]), torch.ones(2, 3, dtype=torch.bool), ())
    z = torch.sigmoid(torch.cat([v, t], dim=1) @ (w["parts.image.gate.weight"] - w["parts.audio.gate.weight"]).t())
    h_v, h_t = torch.tanh(v @ w["parts.image.value.weight"].t()), torch.tanh(t @ w["parts.audio.value.weight"].t())
    torch.testing.assert_close(found, z * h_v + (1 - z) * h_t)


def test_fixed_weights_are_kept_in_proportion_by_the_parts_that_are_there() -> None:
    fusion = made("late", NAMES, weights={"image": 1.0, "audio": 2.0, "text": 5.0})
    assert not list(fusion.parameters()) and not fusion.state_dict()
    mean_PBD = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)[:, None, None].expand(3, 2, D)
    present_PB = torch.tensor([[True, True], [True, True], [True, False]])
    found = fusion(torch.zeros(0, D), mean_PBD * present_PB[:, :, None], present_PB, ())
    assert found[:, 0].tolist() == pytest.approx([(1 + 20 + 500) / 8, (1 + 20) / 3])


def test_a_grid_needs_values_of_whole_rows() -> None:
    scene = {"kind": "graph", "parts": ["image", "audio"], "edges": ["modality", "space"], "grid": {"image": 3}}
    config = tiny_config(Path("unused"), representations={"scene": scene}, objectives=objectives())
    with pytest.raises(ValueError, match=r"scene\.grid image: 3 tokens in a row, and a value of image has "):
        objectives_of(config)
