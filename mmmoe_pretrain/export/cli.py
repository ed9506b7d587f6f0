"""``mmmoe export`` and ``mmmoe import``. Heavy imports wait until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain.paths import given


def export(
    run: Annotated[
        Path, typer.Argument(callback=given, help="The folder of a run, e.g. runs/demo; it is not changed.")
    ],
    out: Annotated[Path, typer.Option("--out", callback=given, help="The folder to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.tokenizer=FILE.")] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16: what training in bf16 computes with.")] = "fp32",
    license_id: Annotated[
        str, typer.Option("--license", help="License of the weights, for the model card.")
    ] = "unknown",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write the weights of a run as safetensors, with config, tokenizer and model card."""
    from mmmoe_pretrain.export.write import export_run

    for line in export_run(
        run, out, step=step, overrides=overrides or [], dtype=dtype, overwrite=overwrite, license_id=license_id
    ):
        print(line)


def import_(
    folder: Annotated[Path, typer.Argument(callback=given, help="What mmmoe export wrote; it is not changed.")],
    out: Annotated[
        Path, typer.Option("--out", callback=given, help="The folder of the new run; its name becomes the run's.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the new run.")] = None,
) -> None:
    """Create a run from an export: its weights at step 0, to train or to evaluate."""
    from mmmoe_pretrain.export.read import import_run

    for line in import_run(folder, out, overrides or []):
        print(line)
