"""``mmmoe generate``: load a run or an export, generate, and write a JSON object a line: ``{"key", "given", "prompt",
"output" (or "ids", of what is no text), "tokens", "ended", "log_probability", "reference" and "language" (of a
sample of shards)}``. What is no text is written as files of a folder, which has these lines as index.jsonl, with a
"file"."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mmmoe_pretrain.checkpoint.model import CONFIG, open_run
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import explain
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.data.evaluation import eval_samples, eval_settings, spread
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.export import layout
from mmmoe_pretrain.generate.growing import Generated
from mmmoe_pretrain.generate.inputs import given, prompts_of
from mmmoe_pretrain.generate.tasks import ROWS, Prompt, Task
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.parallel.runtime import named_device
from mmmoe_pretrain.paths import new_file, new_folder

INDEX = "index.jsonl"  # of a folder of generated files


@dataclass(frozen=True)
class Request:
    """``files``, ``texts`` and ``by_name`` (NAME=VALUE), or ``data``: shards. ``options``: settings of
    ``GenerateConfig`` that were given."""

    task: str
    files: Sequence[str] = ()
    texts: Sequence[str] = ()
    by_name: Sequence[str] = ()
    data: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def generate_command(
    run_dir: Path, request: Request, out: Path | None, overrides: Sequence[str], device: str
) -> None:
    """Write to ``out``, or print where it is None."""
    model, config, modalities = open_model(run_dir, overrides, named_device(device))
    settings = eval_settings(config, modalities)
    task = Task(request.task, model, settings, how(config, request))
    if request.data and (request.by_name or request.files or request.texts):
        raise ValueError("--data names samples, and the other options name files and texts; give one of both")
    if request.data:
        prompts: Iterator[Prompt] = held_out_prompts(task, request.data, config, modalities)
        labels: list[dict[str, str]] = []
    else:
        values = given(task, modalities, request.files, request.texts, request.by_name)
        prompts = iter(prompts_of(task, modalities, values))
        labels = [values.row(number) for number in range(len(values))]
    made = _made(task, prompts, labels, ", ".join(request.data))
    if out is None:
        for found, _ in made:
            print(_json(found))
    elif task.is_text:
        with new_file(out) as draft:
            draft.write_text("".join(f"{_json(found)}\n" for found, _ in made), encoding="utf-8")
        print(f"wrote {out}")
    else:
        if out.exists():
            raise ValueError(f"{out} exists, and a folder of files is to be written there; choose another --out")
        with new_folder(out) as draft:
            _write_files(made, draft)
        print(f"wrote {out}: files and {INDEX}")


Made = Iterator[tuple[dict[str, Any], Callable[[], tuple[bytes, str]]]]


def _made(task: Task, prompts: Iterator[Prompt], labels: Sequence[dict[str, str]], where: str) -> Made:
    """Of each prompt its line, and what makes a file of its value. Raises ValueError where there is no prompt."""
    number = -1
    for number, (prompt, generated) in enumerate(task.run(prompts)):
        yield line(task, prompt, generated, labels[number] if labels else {}), partial(task.file, prompt, generated)
    if number < 0:
        raise ValueError(f"no sample of {where} has what task {task.name} generates from")


def _write_files(made: Made, folder: Path) -> None:
    with (folder / INDEX).open("w", encoding="utf-8") as index:
        for number, (found, file) in enumerate(made):
            content, extension = file()
            name = f"{number:05}.{extension}"
            (folder / name).write_bytes(content)
            print(_json({**found, "file": name}), file=index)


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False)


def how(config: RunConfig, request: Request) -> GenerateConfig:
    """The options, upon those of the run's ``evaluate.generate`` where no other method is given."""
    own = config.evaluate.generate.get(request.task)
    options = dict(request.options)
    if own is not None and options.get("method", own.method) == own.method:
        options = {**own.model_dump(exclude_defaults=True, exclude={"samples"}), **options}
    try:
        return GenerateConfig(**options)
    except ValidationError as error:
        raise ValueError("; ".join(explain(error))) from None


def held_out_prompts(task: Task, paths: Sequence[str], config: RunConfig, modalities: Modalities) -> Iterator[Prompt]:
    """Of the samples of shards that have what ``task`` generates from; some have what it should generate."""
    files = Files(read_settings(config))
    number = sum(len(open_indexed(path, files, modalities)) for path in paths)
    chosen = set(spread(number, task.how.samples or number))
    for samples, positions in eval_samples(paths, config, modalities, ROWS):
        for sample, position in zip(samples, positions, strict=True):
            if position in chosen and sample.items:
                prompt = task.prompt(sample, position)
                if prompt is None and not task.has_value(sample):
                    prompt = task.begin(sample, position=position)
                if prompt is not None:
                    yield prompt


def line(task: Task, prompt: Prompt, generated: Generated, shown: Mapping[str, str]) -> dict[str, Any]:
    """What is written of one prompt."""
    begun = task.modality.keys(prompt.sample.items[-1].value)[1 : prompt.places]
    output, reference = task.text(generated.ids), task.reference(prompt)
    found: dict[str, Any] = {"key": prompt.key, **({"given": dict(shown)} if shown else {})}
    if len(begun):
        found["prompt"] = task.text(begun) or begun.tolist()
    found |= {"ids": list(generated.ids)} if output is None else {"output": output}
    found |= {"tokens": len(generated.ids), "ended": generated.ended}
    found["log_probability"] = round(generated.log_probability, 6)
    if reference is not None:
        found["reference"] = reference
    if language := prompt.sample.meta.language:
        found["language"] = language
    return found


def open_model(run_dir: Path, overrides: Sequence[str], device: torch.device) -> tuple[MMMoE, RunConfig, Modalities]:
    """Of a run or an export. Raises ValueError where the tokenizer is not the one that it was trained with."""
    if not (run_dir / CONFIG).is_file() and (run_dir / layout.INDEX).is_file():
        from mmmoe_pretrain.export.read import load_export  # a second to import

        if overrides:
            raise ValueError(f"{run_dir} is an export, of which no setting is changed; remove {' '.join(overrides)}")
        return load_export(run_dir, device)
    run = open_run(run_dir, overrides)
    fingerprint = run.meta.get("tokenizer_fingerprint")
    modalities = build_modalities(run.config.modalities, run.config.data.tokenizer, fingerprint=fingerprint)
    return run.model().to(device), run.config, modalities
