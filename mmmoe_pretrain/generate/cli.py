"""``mmmoe generate``. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain.paths import given

Files = list[str] | None
EXAMPLE = "Example: mmmoe generate runs/demo --task captions --file cat.png --method beam"


def generate(
    run: Annotated[Path, typer.Argument(callback=given, help="The folder of a run or of an export.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.tokenizer=FILE.")] = None,
    task: Annotated[str, typer.Option(help="The objective that generates, e.g. captions.")] = "captions",
    files: Annotated[
        Files,
        typer.Option(
            "--file",
            "--image",
            "--audio",
            callback=given,
            help="A file of the modality that reads its extension; repeat it for several prompts.",
        ),
    ] = None,
    text: Annotated[Files, typer.Option(help="The beginning of the text, or a text to generate from.")] = None,
    item: Annotated[Files, typer.Option(help="NAME=FILE, or NAME=TEXT, of another modality.")] = None,
    data: Annotated[Files, typer.Option(callback=given, help="Shards, whose samples are the prompts.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of the shards, so many, spread evenly; 0: all.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of the shards' texts, so many tokens are given.")] = None,
    method: Annotated[str | None, typer.Option(help="greedy, sample or beam; default: greedy.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sample: below 1 sharper, above 1 flatter.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of sample: from so many of the most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sample: from the fewest with this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sample: the same seed draws the same.")] = None,
    beams: Annotated[int | None, typer.Option(help="Of beam: how many beginnings are kept.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beam: 0 prefers short texts.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at most; default: of the modality.")] = None,
    modality: Annotated[str | None, typer.Option(help="What is generated; default: the task's last.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=given, help="A file of JSON lines, or of images and sounds a folder; default: print."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
) -> None:
    """Generate texts, or images and sounds of codes, from files, a text, or the samples of shards."""
    from mmmoe_pretrain.generate.command import Request, generate_command

    options = {
        "method": method, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "beams": beams,
        "length_penalty": length_penalty, "max_tokens": max_tokens, "modality": modality, "samples": samples,
        "prompt_tokens": prompt_tokens,
    }  # fmt: skip
    chosen = {name: value for name, value in options.items() if value is not None}
    generate_command(
        run, Request(task, files or [], text or [], item or [], data or [], chosen), out, overrides or [], device
    )
