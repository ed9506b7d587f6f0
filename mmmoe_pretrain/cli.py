"""The command line: ``mmmoe train``, ``plan``, ``status``, ``doctor``, ``evaluate``, ``generate``, ``routing``,
``latents``, ``experts``, ``align``, ``extend``, ``export`` and ``import``.

Heavy imports wait until a command runs, so that ``--help`` answers at once. Errors that a user can fix (ValueError)
print one line and exit with code 2, a full disk one and code 1; other errors are bugs and show their traceback.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.export.cli import export, import_
from mmmoe_pretrain.generate.cli import EXAMPLE as GENERATE_EXAMPLE
from mmmoe_pretrain.generate.cli import generate
from mmmoe_pretrain.paths import given
from mmmoe_pretrain.plan.cli import EXAMPLE as PLAN_EXAMPLE
from mmmoe_pretrain.plan.cli import plan
from mmmoe_pretrain.surgery.cli import align, experts, extend

NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain multimodal mixture-of-experts transformers.",
)
app.add_typer(experts, name="experts")
configs = typer.Typer(no_args_is_help=True, help="Upgrade configs of earlier versions.")
app.add_typer(configs, name="config")
app.command("align")(align)
app.command("extend")(extend)
app.command("plan", epilog=PLAN_EXAMPLE)(plan)
app.command("generate", epilog=GENERATE_EXAMPLE)(generate)
app.command("export")(export)
app.command("import")(import_)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(callback=given, help="The run's YAML file, e.g. configs/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.steps=100.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Fail if there is no checkpoint to resume from.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="First check the hosts (mmmoe doctor); 1 if a check fails.")
    ] = False,
) -> None:
    """Train on this process, or on all ranks of torchrun. A run that has a checkpoint resumes from it.

    Exit codes: 0 done, 2 an error that you can fix, 75 saved after a signal (start it again), 76 a rank hung.
    """
    if sys.platform != "linux":
        raise ValueError(f"training runs on Linux, and this is {sys.platform}; train in a container (make image)")
    store = _examine(config, overrides or [], None) if preflight else None  # open until training has its own
    gc.disable()  # a sixth of the time of imports would be collections that find nothing
    from mmmoe_pretrain.train.loop import train as run_training
    from mmmoe_pretrain.train.start import config_to_train

    gc.enable()
    code = run_training(config_to_train(config, overrides or []), resume=resume, overwrite=overwrite)
    del store
    raise typer.Exit(exit_codes.record(code))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(callback=given, help="Check this run's layout and data, too.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. runs_dir=FOLDER.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(callback=given, help="Check this folder; default: that of CONFIG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine, or all hosts of torchrun: versions, GPUs, limits, clocks, the run's folder, the network.

    Ends within a minute. Exit codes: 0 no check failed (there may be warnings), 1 a check failed, 2 bad usage.
    """
    _examine(config, overrides or [], run_dir, as_json)


def _examine(config: Path | None, overrides: list[str], run_dir: Path | None, as_json: bool = False) -> object:
    from mmmoe_pretrain import config as run_config
    from mmmoe_pretrain.doctor.peer import Subject
    from mmmoe_pretrain.doctor.run import examine

    if config is not None and "RANK" not in os.environ:  # among hosts it is a check, which names them
        run_config.load(config, overrides)
    return examine(Subject(config, overrides, run_dir), as_json)


@app.command()
def status(
    runs: Annotated[
        list[Path], typer.Argument(callback=given, help="The folder of a run, e.g. runs/demo, or several.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a run, one a line.")] = False,
) -> None:
    """Show what a run does, how far and how fast it is, when it ends, and what happened last, from its folder."""
    from mmmoe_pretrain.train.status_page import command

    command(runs, as_json)


Run = Annotated[Path, typer.Argument(callback=given, help="The folder of a run, e.g. runs/demo.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.tokenizer=FILE.")]
Test = Annotated[
    list[str] | None,
    typer.Option(callback=given, help="Held-out shards (repeat it for several); default: evaluate.test."),
]

Device = Annotated[str, typer.Option(help="What computes: auto (a GPU where there is one), cpu or cuda.")]


@app.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    test: Test = None,
    out: Annotated[Path | None, typer.Option(callback=given, help="Where to write; default: RUN.")] = None,
    beside: Annotated[
        Path | None, typer.Option(callback=given, help="Another run that was evaluated: a column with its scores.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a trained model on held-out data and report its routing."""
    from mmmoe_pretrain.evaluate.run import evaluate_command

    evaluate_command(run, test or [], beside, out, overrides or [], device)


@app.command()
def routing(
    run: Run,
    overrides: Overrides = None,
    test: Test = None,
    out: Annotated[Path | None, typer.Option(callback=given, help="Where to write; default: RUN.")] = None,
    top: Annotated[int, typer.Option(help="Top-activating tokens shown for each expert and modality.")] = 8,
    ablate: Annotated[
        int | None,
        typer.Option(help="Also mask experts one by one on so many held-out samples: what is lost without each."),
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(callback=given, help="Another seed of the run: how alike both divide the tokens.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show where the router sends tokens, and each expert's top-activating tokens, in one page: RUN/routing.html."""
    from mmmoe_pretrain.evaluate.routing.command import routing_command

    routing_command(run, test or [], out, top, overrides or [], device, ablate, beside)


@app.command()
def latents(
    run: Run,
    overrides: Overrides = None,
    test: Test = None,
    out: Annotated[Path, typer.Option(callback=given, help="The folder of the page.")] = Path("latents"),
    objective: Annotated[str, typer.Option(help="The objective that generates, where a run has several.")] = "",
    samples: Annotated[int, typer.Option(help="Held-out samples that are shown.")] = 6,
    steps: Annotated[int, typer.Option(help="Latent vectors on the way from one sample to the next.")] = 5,
    device: Device = "auto",
) -> None:
    """Show what a run generates from latent numbers: images, sounds and texts from each other, and ways between them,
    in one page: OUT/index.html."""
    from mmmoe_pretrain.evaluate.latents_page import latents_command

    latents_command(run, test or [], out, objective, samples, steps, overrides or [], device)


@configs.command("upgrade")
def upgrade(
    file: Annotated[Path, typer.Argument(callback=given, help="A run's YAML file.")],
) -> None:
    """Rewrite a config of an earlier version in the current format; the old file is kept as FILE.old."""
    import yaml

    from mmmoe_pretrain import config as run_config
    from mmmoe_pretrain.config.upgrade import needs_upgrade, upgraded
    from mmmoe_pretrain.untrusted import read_yaml

    if file.is_dir():
        raise ValueError(
            f"{file} is a folder; give a YAML file. Checkpoints of earlier versions cannot be upgraded: resume such "
            f"a run with the version that began it, or upgrade a copy of its config.yaml and train again"
        )
    if not file.is_file():
        raise ValueError(f"no config at {file}")
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, not a mapping of sections")
    if not needs_upgrade(values):
        print(f"{file} needs no change")
        return
    new, kept = upgraded(values), file.with_name(file.name + ".old")
    run_config.parse(new, where=f"{file}, upgraded")
    if kept.exists():
        raise ValueError(f"{kept} exists, and would be lost; move it away")
    kept.write_bytes(file.read_bytes())
    file.write_text(yaml.safe_dump(new, sort_keys=False), encoding="utf-8")
    print(f"wrote {file}; the old one, with its comments, is {kept}")


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    if "TORCHELASTIC_RUN_ID" in os.environ and exit_codes.EXIT_FILE in os.environ:  # a worker of launch/torchrun.sh
        exit_codes.end_with_parent()
    if exit_codes.ended_for_good():
        sys.exit(exit_codes.DONE)
    exit_codes.forget_earlier()
    try:
        try:
            app()
        finally:
            print(end="", flush=True)  # Python's own flush, at its end, prints a traceback
    except ValueError as error:
        exit_codes.tell(error)
        passing = isinstance(error, exit_codes.Restartable | OSError)  # a storage that does not respond
        code = exit_codes.FAULT if passing else exit_codes.USER_ERROR
        sys.exit(exit_codes.record(code))
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        if error.errno != errno.EPIPE:  # else who read the output has ended
            where = error.filename or "the output, or a file"
            print(f"mmmoe: cannot write {where}: {error.strerror}; make room, or write elsewhere", file=sys.stderr)
        sys.exit(exit_codes.record(exit_codes.FAULT))


if __name__ == "__main__":
    main()
