"""``mmmoe latents``: what an objective generates from latent numbers, to look at and to listen to, for some held-out
samples: a page, ``index.html``, beside images (PNG) and sounds (WAV).

For each sample: its own items, and each modality as it is generated from each one alone, and from all. Then ways
between samples: latent vectors on the straight line from the posterior of one sample to that of the next, with all
modalities, and from one modality of it to another one of the next.

Sounds are of spectrograms, whose phases are made up (``Modality.audible``).

Shapes: B samples, L latent numbers.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate.features import device_of
from mmmoe_pretrain.evaluate.latents import generative_module, values_of
from mmmoe_pretrain.evaluate.rows import HeldOutRows, open_rows
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objective
from mmmoe_pretrain.objectives.base import GenerativeModule
from mmmoe_pretrain.parallel.runtime import named_device
from mmmoe_pretrain.paths import make_folder, new_file

PAGE = "index.html"
STYLE = """body { font: 15px sans-serif; margin: 2em; } table { border-collapse: collapse; margin-bottom: 2em; }
td, th { border: 1px solid #ccc; padding: 4px 8px; text-align: center; } img { width: 96px; display: block; }
audio { width: 180px; display: block; }"""


def latents_command(
    run_dir: Path,
    test: Sequence[str],
    out: Path,
    name: str,
    samples: int,
    steps: int,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> None:
    """Write the page to ``out``, of ``samples`` held-out ones that have every modality, and print where it is.
    ``name``: of the objective; empty where the run has one. ``steps``: of each way between two samples."""
    if samples < 2 or steps < 2:
        raise ValueError(f"--samples {samples} and --steps {steps} must be 2 or more: a way has two ends")
    model, config, step = load_model(run_dir, overrides, named_device(device))
    objective = _chosen(model, name, run_dir)
    rows = open_rows(run_dir, config, test)
    shown = _complete(rows, objective, samples)
    make_folder(out)
    page = _Page(out, title=f"{config.name}, step {step}: {objective.name}")
    with torch.inference_mode():
        _fill(page, objective, model, rows, run_dir, shown, steps)
    with new_file(out / PAGE) as draft:
        draft.write_text(page.text, encoding="utf-8")
    print(f"wrote {out / PAGE}, {page.files} images and sounds")


def _chosen(model: MMMoE, name: str, run_dir: Path) -> Objective:
    able = {key: its for key, its in model.objectives.items() if its.reconstructs}
    if name in able:
        return able[name]
    if name or len(able) != 1:
        known = ", ".join(able) or "none"
        raise ValueError(
            f"{run_dir}: objectives that generate from latent numbers are {known}"
            + (f"; --objective names one of them, not {name}" if name else "; name one by --objective" * bool(able))
        )
    return next(iter(able.values()))


def _complete(rows: HeldOutRows, objective: Objective, count: int) -> tuple[list[Sample], list[int]]:
    """Samples of different groups that have every modality, and their positions."""
    found: dict[str, tuple[Sample, int]] = {}
    for samples, positions in rows.samples():
        for sample, position in zip(samples, positions, strict=True):
            if all(sample.first(name) is not None for name in objective.reconstructs):
                found.setdefault(sample.meta.own_group, (sample, position))
    if len(found) < 2:
        raise ValueError(
            f"{', '.join(rows.paths)}: fewer than two held-out samples have {' and '.join(objective.reconstructs)}; "
            f"name others by --test"
        )
    every = list(found.values())
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)]
    return [sample for sample, _ in chosen], [position for _, position in chosen]


@dataclass
class _Page:
    """The page so far, in ``folder``, and the number of its files."""

    folder: Path
    title: str
    parts: list[str] = field(default_factory=list)
    files: int = 0

    @property
    def text(self) -> str:
        title = html.escape(self.title)
        head = f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style></head>"
        return f"{head}<body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"

    def table(self, title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        """``rows``: each its name and cells of ``shown``."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *columns))
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            for name, cells in rows
        )
        self.parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>")

    def shown(self, modality: Modality, value: np.ndarray) -> str:
        """A cell with what the modality can show of the value."""
        if (words := modality.words(value)) is not None:
            return html.escape(words)
        found = ""
        if (drawn := modality.draw(value, 0)) is not None:
            name = self._new("png")
            drawn[0].save(self.folder / name)
            found += f"<img src='{name}' alt=''>"
        if (sound := modality.audible(value)) is not None:
            import soundfile

            name = self._new("wav")
            soundfile.write(self.folder / name, *sound, subtype="PCM_16")
            found += f"<audio controls preload='none' src='{name}'></audio>"
        return found or html.escape(str(np.round(value, 2).tolist()))

    def _new(self, extension: str) -> str:
        self.files += 1
        return f"{self.files:04}.{extension}"


def _fill(
    page: _Page,
    objective: Objective,
    model: MMMoE,
    rows: HeldOutRows,
    run_dir: Path,
    shown: tuple[list[Sample], list[int]],
    steps: int,
) -> None:
    samples, positions = shown
    batch = pack(samples, eval_settings(rows.config, rows.modalities), positions).to(device_of(model))
    module, features = generative_module(run_dir, rows, objective, model), model(batch)[0].features
    made = _Maker(page, module, rows, features, batch, samples)
    names = objective.reconstructs
    sources = {**{name: (name,) for name in names}, **({"all": names} if len(names) > 1 else {})}
    latent = {source: module.latent(seen, features, batch) for source, seen in sources.items()}
    keys = [sample.meta.key for sample in samples]
    for target in names:
        generated = [(f"from {source}", made.cells(target, z_BL)) for source, z_BL in latent.items()]
        page.table(f"{target}: true and generated", keys, [("true", made.truth(target)), *generated])
    shares = np.linspace(0, 1, steps).tolist()
    ways = [f"{here} → {there}" for here, there in zip(keys, [*keys[1:], keys[0]], strict=True)]
    last = list(sources)[-1]
    for first, second in [(last, last), *itertools.permutations(names, 2)]:
        from_BL, to_BL = latent[first], latent[second].roll(-1, dims=0)  # of the next sample
        for target in names:
            columns = [made.cells(target, torch.lerp(from_BL, to_BL, share)) for share in shares]
            title = f"{target}: from {first} of a sample to {second} of the next"
            between = list(zip(ways, zip(*columns, strict=True), strict=True))
            page.table(title, [f"{share:.0%}" for share in shares], between)


@dataclass(frozen=True)
class _Maker:
    """Makes cells of the page of latent vectors [B, L], one for each sample."""

    page: _Page
    module: GenerativeModule
    rows: HeldOutRows
    features: dict[str, Tensor]
    batch: Batch
    samples: Sequence[Sample]

    def truth(self, target: str) -> list[str]:
        """Of the samples' own items."""
        items = [sample.first(target) for sample in self.samples]
        return [self.page.shown(self.rows.modalities[target], item.value) for item in items if item is not None]

    def cells(self, target: str, z_BL: Tensor) -> list[str]:
        """Of what is generated of modality ``target``."""
        modality = self.rows.modalities[target]
        values = values_of(self.module, modality, z_BL, self.features, self.batch, self.samples)
        return [self.page.shown(modality, value) for value in values]
