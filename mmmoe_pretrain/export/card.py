"""The model card of an export: front matter as Hugging Face reads it, and facts of the run.

It contains only facts from the run's folder and its training shards. The rest is marked "to be filled in".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import NOT_OF_THE_MODEL
from mmmoe_pretrain.data.decode import BadSampleError, read_row
from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.export.layout import CONFIG, INDEX, TOKENIZER, sparse_blocks
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.objectives import Objectives, build_objectives
from mmmoe_pretrain.untrusted import parse_json, read_json

UNKNOWN_LICENSE = "unknown"
TO_BE_FILLED_IN = "**To be filled in.**"
METRICS, REPORT = "metrics.jsonl", "report.json"
MOST_LICENCES, MOST_SOURCES = 20, 5
MAX_ROWS = 10_000  # of a folder, spread evenly, whose JSON is read
NOT_STATED = "not stated"
LONGEST = 100  # characters of a licence or source


@dataclass(frozen=True)
class Licence:
    name: str
    rows: int
    sources: tuple[str, ...]  # those that the rows name


@dataclass(frozen=True)
class Facts:
    """The content of a card. ``losses``: those logged last up to the exported step, and their step; ``report``: the
    evaluation of that step, else None with the reason in ``no_report``. ``samples``: their number by training folder,
    of those that can be read here; ``licences``: of ``rows`` of these samples, the most frequent first."""

    config: RunConfig
    described: dict[str, Any]  # config.json
    license_id: str
    losses: tuple[int, dict[str, float | None]] | None
    report: dict[str, Any] | None
    no_report: str
    samples: dict[str, int]
    licences: tuple[Licence, ...]
    rows: int


def facts_of(run_dir: Path, config: RunConfig, described: dict[str, Any], license_id: str) -> Facts:
    """Reads the run's log and report and its training shards, where they are there."""
    report, why = _report(run_dir / REPORT, described["step"])
    losses = _losses(run_dir / METRICS, described["step"])
    files = Files(read_settings(config))
    opened = ((source.path, _opened(source.path, files)) for source in config.data.train)
    folders = {path: folder for path, folder in opened if folder is not None}
    samples = {path: len(folder) for path, folder in folders.items()}
    licences = _licences_of(row for folder in folders.values() for row in _rows(folder))
    rows = sum(licence.rows for licence in licences)
    return Facts(config, described, license_id, losses, report, why, samples, licences, rows)


def page(facts: Facts) -> str:
    """The card as Markdown."""
    sections = {
        "Architecture": _architecture(facts),
        "Training": _training(facts),
        "Licences of the training data": _licences(facts),
        "Evaluation": _results(facts),
        "How to load": _how_to_load(facts),
    }
    lines = [*_front_matter(facts), "", *_what_it_is(facts), ""]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    for title in ("Intended use", "Limits", "Biases", "Consent of the people in the data"):
        lines += [f"## {title}", "", TO_BE_FILLED_IN, ""]
    return "\n".join(lines).rstrip() + "\n"


def _losses(path: Path, step: int) -> tuple[int, dict[str, float | None]] | None:
    if not path.is_file():
        return None
    found = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # a writer was killed in the middle of it
            record = parse_json(line, where := f"{path}, line {number},")
            if not isinstance(record, dict) or not {"step", "losses"} <= record.keys():
                raise ValueError(f"{where} is not a record of a step; fix the line or move the file away")
            if record["step"] > step:
                break
            found = record
    return None if found is None else (found["step"], found["losses"])


def _report(path: Path, step: int) -> tuple[dict[str, Any] | None, str]:
    if not path.is_file():
        return None, "The run has no evaluation; `mmmoe evaluate` makes one."
    try:
        report = read_json(path)
    except ValueError:  # e.g. the evaluation was killed while it wrote
        return None, f"The run's {REPORT} is damaged; `mmmoe evaluate` makes it again."
    if report.get("step") != step:
        return None, f"The run's evaluation is of step {report.get('step')}, not of these weights."
    return report, ""


def _licences_of(rows: Iterable[dict[str, Any]]) -> tuple[Licence, ...]:
    counts: Counter[str] = Counter()
    sources: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        name = _text(row.get("licence")) or NOT_STATED
        counts[name] += 1
        sources[name] |= {_text(row.get("source"))} - {""}
    return tuple(Licence(name, count, tuple(sorted(sources[name]))) for name, count in counts.most_common())


def _opened(path: str, files: Files) -> Indexed | None:
    try:
        return open_indexed(path, files)
    except ValueError:  # the shards are elsewhere, or damaged
        return None


def _rows(folder: Indexed) -> Iterator[dict[str, Any]]:
    for i in np.linspace(0, len(folder) - 1, min(len(folder), MAX_ROWS)).astype(int).tolist():
        try:
            yield read_row(folder.read(i, only=(META,)))
        except BadSampleError:
            yield {}  # training skips such a sample


def _text(value: object) -> str:
    """One printable line of it."""
    return " ".join(value.split())[:LONGEST] if isinstance(value, str) and value.isprintable() else ""


def _objectives(config: RunConfig) -> Objectives:
    modalities = build_modalities(config.modalities, decoding=False)
    return build_objectives(config.objectives, modalities, config.representations)


def _modalities(config: RunConfig) -> list[str]:
    """The modalities that some objective trains."""
    trained = {name for wanted in _objectives(config).needs().values() for name in wanted}
    return [name for name in config.modalities if name in trained]


def _front_matter(facts: Facts) -> Iterator[str]:
    config = facts.config
    tags = ["mixture-of-experts", "multimodal", "pretraining", *_modalities(config)]
    if config.moe.dense:
        tags.remove("mixture-of-experts")
    values: dict[str, Any] = {"license": facts.license_id, "library_name": "mmmoe", "tags": tags}
    yield "---"
    yield yaml.safe_dump(values, sort_keys=False).rstrip()
    yield "---"
    yield f"# {config.name}"


def _what_it_is(facts: Facts) -> Iterator[str]:
    counts, config = facts.described["parameters"], facts.config
    kind = "dense transformer" if config.moe.dense else "mixture-of-experts transformer"
    yield (
        f"A {kind} over {_listed(_modalities(config))} tokens in one stream, pretrained with MMMoE "
        f"{facts.described['mmmoe_version']}: {counts['total']:,} parameters, {counts['active']:,} active "
        f"per token. These are the weights of step {facts.described['step']:,}."
    )
    yield ""
    objectives = _objectives(config)
    for loss, weight in objectives.weights(facts.described["step"]).items():
        kind = objectives[objectives.losses[loss]].settings.kind
        yield f"- loss {loss} (kind {kind}), weight {weight:g}"
    if facts.license_id == UNKNOWN_LICENSE:
        yield f"- license of the weights: {TO_BE_FILLED_IN}"


def _architecture(facts: Facts) -> Iterator[str]:
    model, described = facts.config.model, facts.described
    shared = f", {model.kv_heads} of keys and values" if model.kv_heads < model.num_heads else ""
    yield f"- {model.num_layers} blocks, hidden size {model.hidden_size}, {model.num_heads} heads{shared}"
    if representations := _objectives(facts.config).representations:
        yield f"- joint embedding of {model.embedding_size} numbers for {_listed(list(representations))}"
    if described["vocab_size"]:
        yield f"- a vocabulary of {described['vocab_size']:,} pieces"
    for name, modality in build_modalities(facts.config.modalities, decoding=False).items():
        settings = modality.settings.model_dump(mode="json", exclude={"kind", *NOT_OF_THE_MODEL})
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        yield f"- {name} (kind {modality.settings.kind}), at most {modality.max_tokens:,} tokens: {shown}"
    for index, moe in sparse_blocks(facts.config):
        sizes = sorted({group.expert_hidden_size or moe.expert_hidden_size for group in moe.groups})
        more = [
            f"a shared expert of {moe.shared_expert_hidden_size}" if moe.shared_expert_hidden_size else "",
            f"{moe.identity_experts} identity and {moe.null_experts} null experts"
            if moe.identity_experts or moe.null_experts else "",
            f"attention of size {moe.expert_attention_size} among them" if moe.expert_attention_size else "",
            f"a routing memory of {moe.routing_memory_size} numbers" if moe.routing_memory_size else "",
        ]  # fmt: skip
        yield (
            f"- block {index}: {moe.num_experts} experts of hidden size {_listed([str(s) for s in sizes])}, "
            f"{moe.experts_per_token} a token, router {moe.router}{''.join(', ' + m for m in more if m)}"
        )
    stored = "fp32" if described["dtype"] == "fp32" else "bf16 (vectors, routers, embedders and joint heads fp32)"
    yield f"- stored in {stored}; trained in {facts.config.train.precision}"


def _training(facts: Facts) -> Iterator[str]:
    config = facts.config
    yield (
        f"{facts.described['step']:,} of {config.train.steps:,} steps of {config.train.global_batch_size:,} samples, "
        f"seed {config.seed}, optimizer {config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g}."
    )
    yield ""
    shares = [source.mean_weight(config.train.steps) for source in config.data.train]
    samples = facts.samples
    yield from _table(("data", "its samples", "share of the mix"),
                      [(source.path, f"{samples[source.path]:,}" if source.path in samples else "-",
                        f"{share / sum(shares):.1%}")
                       for source, share in zip(config.data.train, shares, strict=True)])  # fmt: skip
    if facts.losses is not None:
        step, losses = facts.losses
        yield ""
        yield f"Losses as logged at step {step:,}, each times its weight:"
        yield ""
        yield from _table(("loss", "value"), [(name, _number(value)) for name, value in losses.items()])


def _licences(facts: Facts) -> Iterator[str]:
    shown = facts.licences[:MOST_LICENCES]
    absent = [source.path for source in facts.config.data.train if source.path not in facts.samples]
    if absent:
        yield f"Without {', '.join(absent)}, which could not be read where this card was written: {TO_BE_FILLED_IN}"
        yield ""
    if not facts.licences:
        return
    total = sum(facts.samples.values())
    spread = "" if facts.rows == total else f", spread evenly over {total:,}"
    yield f"From the JSON of {facts.rows:,} samples{spread}:"
    yield ""
    yield from _table(("licence", "samples", "sources"),
                      [(licence.name, f"{licence.rows:,}", _some(licence.sources)) for licence in shown])  # fmt: skip
    if len(shown) < len(facts.licences):
        yield f"\nand {len(facts.licences) - len(shown)} more."
    if any(licence.name == NOT_STATED for licence in facts.licences):
        yield f"\nOf the samples that state none: {TO_BE_FILLED_IN}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_SOURCES
    return ", ".join(names[:MOST_SOURCES]) + (f" and {more} more" if more > 0 else "")


def _results(facts: Facts) -> Iterator[str]:
    if facts.report is None:
        yield facts.no_report
        return
    yield f"Evaluated {facts.report['date']}; chance answers at random. In brackets: 95% interval."
    yield ""
    rows = []
    for row in facts.report["results"]:
        low, high = row["interval"]
        rows.append((row["metric"], row["unit"], f"{_number(row['value'])} [{_number(low)}, {_number(high)}]",
                     _number(row["chance"]), f"{row['n']:,}"))  # fmt: skip
    yield from _table(("metric", "unit", "value", "chance", "n"), rows)
    for note in facts.report["notes"]:
        yield f"\n- {note}"


def _how_to_load(facts: Facts) -> Iterator[str]:
    tokenizer = f", `{TOKENIZER}` is a sentencepiece model" if facts.described["tokenizer"] else ""
    yield f"`{INDEX}` says which file holds each tensor, `{CONFIG}` the settings{tokenizer}."
    yield ""
    yield "```python"
    yield "import json"
    yield "from safetensors.torch import load_file"
    yield ""
    yield f'files = set(json.load(open("{INDEX}"))["weight_map"].values())'
    yield "weights = {name: tensor for file in files for name, tensor in load_file(file).items()}"
    yield f'config = json.load(open("{CONFIG}"))["config"]'
    yield "```"
    yield ""
    yield "With MMMoE: `mmmoe import FOLDER --out runs/NAME`, then `mmmoe train` or `mmmoe evaluate` on the run."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
