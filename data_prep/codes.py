"""``mmmoe-data codes``: a discrete tokenizer of images or audio, trained on the files of a split (FSQ, see
``modalities/fsq.py``).

The loss is the mean squared error of what the decoder makes of the rounded values; rounding passes its gradient
through as it is. Distinct files in the order of their hashes, and random numbers of a seed, make it deterministic on
one machine; it trains on a GPU where there is one.

Shapes: N values of a batch, C H W of a value (``fsq``), d channels that are quantized.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import explain
from mmmoe_pretrain.data_prep.console import answer
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.data_prep.rows.seen import values_wanted
from mmmoe_pretrain.data_prep.samples import NO_SPLIT, open_samples
from mmmoe_pretrain.modalities.base import BadSampleError, Modality
from mmmoe_pretrain.modalities.codes import OF_KIND, Codes
from mmmoe_pretrain.modalities.fsq import Codebook, Layer, Levels, Network
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import counted, track
from mmmoe_pretrain.untrusted import brief, parse_yaml

log = logging.getLogger(__name__)
FRAMES = 64  # of a longer value, a batch has so many of each, at a random place
MOST_NAMED = 5  # samples that are skipped
FEWEST = 2  # values, at least
WARMUP = 0.05  # of the steps, in which the learning rate rises


@dataclass(frozen=True, slots=True)
class CodesOptions:
    """``levels`` and ``patch``: see ``fsq``. ``max_values``: of more distinct files so many are taken, by hash."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    patch: tuple[int, int] = (8, 8)
    width: int = 32
    steps: int = 1000
    batch: int = 32
    rate: float = 4e-3
    max_values: int = 20_000
    seed: int = 1

    def __post_init__(self) -> None:
        Levels(self.levels)
        for name in ("width", "steps", "batch", "max_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if min(self.patch) < 1 or not 0 < self.rate < math.inf or self.seed < 0:
            raise ValueError(
                f"--patch {list(self.patch)} and --rate {self.rate:g} must be numbers above 0, and --seed "
                f"{self.seed} not negative"
            )


@dataclass(frozen=True)
class Measured:
    """Of held-out values: the mean squared error of a number, as a share of the variance of all numbers, and the
    share of the codes that some place has."""

    error: float
    unexplained: float
    used: float
    values: int


def run(
    paths: Sequence[str],
    out: Path,
    modality: str,
    settings: Sequence[str],
    split: str,
    held_out: str,
    filters: Sequence[str],
    options: CodesOptions,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """The command: read the files of all paths, train, measure on the held-out split, write, print a summary."""
    for flag, name in (("--split", split), ("--held-out", held_out)):
        if name not in SPLITS:
            raise ValueError(f"{flag} {name!r} is not one of {', '.join(SPLITS)}")
    if split == held_out:
        raise ValueError(f"--held-out {held_out} is the split that is trained on; name another")
    if out.suffix != ".npz" or out.is_dir():
        raise ValueError(f"--out {out} is not the name of a file that ends with .npz")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    kind, media = media_of(modality, settings)
    kind.check_patch(media.settings, options.patch)
    found, skipped = read_values(paths, modality, (split, held_out), kind, media, options, values_wanted(filters))
    train, test = found[split], found[held_out]
    if len(train) < FEWEST:
        raise ValueError(
            f"split {split} has {counted(len(train), 'value')} of {modality} that can be used, and training needs "
            f"{FEWEST}; check --split, --filter, --modality and the paths"
        )
    network = Network(train[0].shape[0], options.patch, options.width, Levels(options.levels))
    weights = train_network(network, train, options)
    book = Codebook(network, weights, media.settings.model_dump(mode="json"), {})
    measured = measure(book, test) if test else None
    book.made |= {**dataclasses.asdict(options), "split": split, "filter": list(filters), "values": len(train)}
    book.made |= {"held_out": dataclasses.asdict(measured) if measured else None}
    with new_file(out) as draft:
        book.write(draft)
    facts = {"out": str(out), "codes": book.codes, "values": len(train), "skipped_samples": skipped,
             "held_out": book.made["held_out"], **kind.sizes(book)}  # fmt: skip
    lines = [f"{out}: {book.codes:,} codes from {counted(len(train), 'value')} of {modality} of {split}",
             f"in a config: {{kind: {OF_KIND.format(modality)}, tokenizer: {out}, "
             f"{', '.join(f'{name}: {size}' for name, size in kind.sizes(book).items())}}}"]  # fmt: skip
    if measured:
        lines.append(
            f"held out ({held_out}, {counted(measured.values, 'value')}): mean squared error {measured.error:.4f}, "
            f"{100 * measured.unexplained:.1f}% of the variance; {100 * measured.used:.1f}% of the codes are used"
        )
    else:
        lines.append(f"nothing was measured: split {held_out} has no {modality}")
    if skipped:
        lines.append(f"skipped {counted(skipped, 'sample')} that cannot be used; `mmmoe-data inspect` counts them")
    answer(as_json, facts, *lines)


def numbers_of(flag: str, text: str, separator: str) -> tuple[int, ...]:
    """Whole numbers that a user gave."""
    try:
        return tuple(int(number) for number in text.split(separator))
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not whole numbers with {separator!r} between them") from None


def patch_of(text: str, modality: str) -> tuple[int, int]:
    """The patch that a user gave, or where it is empty the one that suits the modality."""
    if not text:
        return kind_of(modality).patch
    numbers = numbers_of("--patch", text, "x")
    if len(numbers) > 2:
        raise ValueError(f"--patch {text!r} is not ROWSxCOLUMNS; e.g. 8x8")
    return numbers[0], numbers[-1]


def kind_of(modality: str) -> type[Codes]:
    """The kind of the codes of a modality's values."""
    able = [kind for kind in kinds.MODALITIES.names if OF_KIND.format(kind) in kinds.MODALITIES.names]
    if modality not in able:
        raise ValueError(f"--modality {modality}: codes are of {' or '.join(able)}")
    kind: type[Codes] = kinds.MODALITIES.load(OF_KIND.format(modality))
    return kind


def media_of(modality: str, settings: Sequence[str]) -> tuple[type[Codes], Modality]:
    """The kind of codes of ``modality``, and the modality that it reads, with ``settings`` as KEY=VALUE."""
    kind = kind_of(modality)
    values: dict[str, Any] = {"kind": modality, **kind.media_defaults}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--setting {setting!r} is not KEY=VALUE; e.g. --setting size=48")
        if name == "kind":
            raise ValueError(f"--setting {setting}: the kind is that of --modality; leave it out")
        values[name] = parse_yaml(value, f"--setting {brief(setting)}")
    media: type[Modality] = kinds.MODALITIES.load(modality)
    try:
        return kind, media(modality, kinds.MODALITIES.settings(values))
    except ValidationError as error:
        raise ValueError(f"--setting: {'; '.join(explain(error))}") from None


def read_values(
    paths: Sequence[str],
    modality: str,
    splits: Collection[str],
    kind: type[Codes],
    media: Modality,
    options: CodesOptions,
    wanted: Mapping[str, Collection[str]],
) -> tuple[dict[str, list[np.ndarray]], int]:
    """The grids of each split, distinct and in the order of their hashes; and how many samples cannot be used, of
    which the first are named in the log."""
    found: dict[str, dict[bytes, np.ndarray]] = {split: {} for split in splits}
    skipped = 0
    seen: set[bytes] = set()
    for sample in itertools.chain.from_iterable(map(open_samples, paths)):
        split = "train" if sample.split == NO_SPLIT else sample.split
        problem = sample.problem
        if not problem and split in found and all(str(sample.fields.get(k) or "") in wanted[k] for k in wanted):
            files = [piece.read for piece in sample.pieces if piece.kind == modality and piece.read is not None]
            try:
                for read in files:
                    data = read()
                    key = hashlib.blake2b(data, digest_size=16).digest()
                    if key not in seen and (value := media.decode(data)) is not None:
                        found[split][key] = kind.grid(value, options.patch)
                    seen.add(key)  # a file of both splits is of the first
            except (BadSampleError, ValueError) as error:
                problem = str(error)
        if problem:
            skipped += 1
            if skipped <= MOST_NAMED:
                log.warning("skipped %s %s: %s", sample.where, sample.key, problem)
    return {split: [its[key] for key in sorted(its)[: options.max_values]] for split, its in found.items()}, skipped


def train_network(network: Network, values: Sequence[np.ndarray], options: CodesOptions) -> dict[str, np.ndarray]:
    """The weights by name, on ``values`` [C, H, W]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = first_weights(network, options.seed, device)
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.95), fused=device.type == "cuda")
    batches = batches_of(network, values, options)
    for step, batch in enumerate(track(batches, "training a tokenizer of codes", options.steps, "steps")):
        rate = options.rate * min(1, (step + 1) / max(1, WARMUP * options.steps)) * (1 - step / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = torch.from_numpy(batch).to(device)
        loss = F.mse_loss(reconstructed(network, weights, x)[0], x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = {name: weight.detach().cpu().numpy() for name, weight in weights.items()}
    if not all(np.isfinite(weight).all() for weight in made.values()):
        raise ValueError(f"training diverged: weights are not finite; lower --rate {options.rate:g}")
    return made


def first_weights(network: Network, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Variance 1 / fan-in, of residual layers a tenth of that; biases zero."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    residual = {
        f"{layer.name}.weight" for layer in (*network.encoder(), *network.decoder()) if layer.op == "residual"
    }
    for name, shape in network.shapes().items():
        std = 0.0 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5 * (0.3 if name in residual else 1.0)
        weights[name] = (torch.randn(shape, generator=generator) * std).to(device).requires_grad_()
    return weights


def batches_of(network: Network, values: Sequence[np.ndarray], options: CodesOptions) -> Iterator[np.ndarray]:
    """float32 [N, C, H, W]: of values with more than FRAMES columns a random part, of shorter ones the value and,
    where some are longer, zeros behind it."""
    rng = np.random.default_rng(options.seed)
    patch = network.patch[1]
    most = max(value.shape[2] for value in values)
    if all(value.shape[2] == most for value in values) and most <= 2 * FRAMES:
        columns = most
    else:
        columns = min(most, max(1, FRAMES // patch) * patch)
    order = np.zeros(0, dtype=np.int64)
    for _ in range(options.steps):
        while len(order) < options.batch:
            order = np.concatenate([order, rng.permutation(len(values))])
        chosen, order = order[: options.batch], order[options.batch :]
        yield np.stack([_part(values[i], columns, patch, rng) for i in chosen])


def _part(value: np.ndarray, columns: int, patch: int, rng: np.random.Generator) -> np.ndarray:
    spare = value.shape[2] - columns
    if spare <= 0:
        return np.pad(value, ((0, 0), (0, 0), (0, -spare)))
    start = int(rng.integers(spare // patch + 1)) * patch
    return value[:, :, start : start + columns]


def reconstructed(network: Network, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] -> the same shape, and the digits [N, d, rows, columns], less ``Levels.half``."""
    bounds = (torch.from_numpy(each).to(x.device)[:, None, None] for each in network.levels.bounds())
    scale, offset, shift = bounds
    bounded = torch.tanh(forward(network.encoder(), weights, x) + shift) * scale - offset
    digits = bounded + (bounded.round() - bounded).detach()  # straight through
    half = torch.from_numpy(network.levels.half).to(x.device)[:, None, None]
    return forward(network.decoder(), weights, digits / half), digits.detach()


def forward(layers: Sequence[Layer], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``fsq.run`` in torch, on [N, C, H, W]."""
    for layer in layers:
        if layer.op == "fold":
            x = _fold(x, layer.factors)
        elif layer.op == "unfold":
            x = _unfold(x, layer.factors)
        else:
            weight, bias = weights[f"{layer.name}.weight"], weights[f"{layer.name}.bias"]
            made = F.conv2d(F.silu(x) if layer.op == "residual" else x, weight, bias, padding=layer.kernel // 2)
            x = x + made if layer.op == "residual" else made
    return x


def _fold(x: Tensor, factors: tuple[int, int]) -> Tensor:
    rows, columns = factors
    x = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # [N, C, H / r, r, W / c, c]
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _unfold(x: Tensor, factors: tuple[int, int]) -> Tensor:
    rows, columns = factors
    x = x.unflatten(1, (-1, rows, columns))  # [N, C, r, c, H, W]
    return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def measure(book: Codebook, values: Sequence[np.ndarray]) -> Measured:
    """How well ``values`` come back, by the way that a run takes."""
    squares, total, numbers, mean = 0.0, 0.0, 0, float(np.mean([value.mean() for value in values]))
    used: set[int] = set()
    for value in values:
        codes = book.encode(value)
        used.update(codes.ravel().tolist())
        squares += float(np.square(book.decode(codes) - value).sum(dtype=np.float64))
        total += float(np.square(value - mean).sum(dtype=np.float64))
        numbers += value.size
    return Measured(squares / numbers, squares / max(total, 1e-12), len(used) / book.codes, len(values))
