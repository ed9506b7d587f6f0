"""``mmmoe experts``, one command an operation, ``mmmoe align`` and ``mmmoe extend``. Heavy imports wait until one
runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmoe_pretrain.paths import given

if TYPE_CHECKING:
    from mmmoe_pretrain.surgery.operation import Result, Source

experts = typer.Typer(no_args_is_help=True, help="Change the experts of a trained model; the result is a new run.")

Run = Annotated[Path, typer.Argument(callback=given, help="The folder of a run, e.g. runs/demo; it does not change.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value of the new run, e.g. train.steps=2000.")]
Out = Annotated[
    Path, typer.Option("--out", callback=given, help="The folder of the new run; its name becomes the run's.")
]
Layers = Annotated[list[int] | None, typer.Option("--layer", help="A block; repeat it. Default: all MoE layers.")]
Noise = Annotated[
    float, typer.Option(min=0, help="Scale of the noise, relative to a weight matrix's root mean square.")
]
Lossy = Annotated[bool, typer.Option("--lossy", help="Allow a change of the function.")]


@experts.command()
def upcycle(
    run: Run,
    out: Out,
    num_experts: Annotated[int, typer.Option(help="Copies of each dense layer.")],
    overrides: Overrides = None,
    experts_per_token: Annotated[int, typer.Option(help="Experts per token; 2 or more.")] = 2,
    noise: Noise = 0.0,
    every: Annotated[
        int | None, typer.Option(min=1, help="An MoE layer in every N-th block; default: moe.every.")
    ] = None,
) -> None:
    """Make an MoE run from a dense run: each expert copies the feed-forward layer; outputs stay equal."""
    from mmmoe_pretrain.surgery.upcycle import upcycle as make

    _write(run, out, overrides, "upcycle", lambda source: make(source, num_experts, experts_per_token, noise, every))


@experts.command()
def split(
    run: Run,
    out: Out,
    factor: Annotated[int, typer.Option(help="Parts of each expert.")],
    overrides: Overrides = None,
    lossy: Lossy = False,
) -> None:
    """Split each expert into N smaller ones and multiply top-k by N; outputs stay equal."""
    from mmmoe_pretrain.surgery.split import split as make

    _write(run, out, overrides, "split", lambda source: make(source, factor, lossy))


@experts.command()
def add(
    run: Run,
    out: Out,
    count: Annotated[int, typer.Option(help="New experts in each layer.")],
    overrides: Overrides = None,
    copy_from: Annotated[int | None, typer.Option(help="The expert to copy; default: the most used ones.")] = None,
    layer: Layers = None,
    noise: Noise = 0.1,
    wake_steps: Annotated[int, typer.Option(help="Optimizer steps over which their dormancy falls to 0.")] = 1000,
    lossy: Lossy = False,
) -> None:
    """Add experts that are dormant at first; outputs stay equal."""
    from mmmoe_pretrain.surgery.add import add as make

    layers = tuple(layer or ())
    _write(run, out, overrides, "add",
           lambda source: make(source, count, copy_from, layers, noise, wake_steps, lossy))  # fmt: skip


@experts.command()
def prune(
    run: Run,
    out: Out,
    overrides: Overrides = None,
    chosen: Annotated[str, typer.Option("--experts", help="The experts to remove, e.g. 3,5.")] = "",
    unused: Annotated[
        bool, typer.Option("--unused", help="Remove the experts that no token chose, by the run's log.")
    ] = False,
    below: Annotated[float, typer.Option(min=0, max=1, help="With --unused: up to this share of a layer.")] = 0.0,
    layer: Layers = None,
    lossy: Lossy = False,
) -> None:
    """Remove experts; outputs stay equal if no token chose them; otherwise --lossy is needed."""
    from mmmoe_pretrain.surgery.prune import prune as make

    if bool(chosen) == unused:
        raise ValueError("name the experts to remove: either --experts 3,5 or --unused")
    numbers, layers, limit = _numbers(chosen), tuple(layer or ()), below if unused else None
    _write(run, out, overrides, "prune", lambda source: make(source, numbers, limit, layers, lossy))


@experts.command()
def merge(
    run: Run,
    out: Out,
    layer: Annotated[int, typer.Option(help="The block.")],
    chosen: Annotated[str, typer.Option("--experts", help="The two experts, e.g. 3,5.")],
    overrides: Overrides = None,
    lossy: Lossy = False,
) -> None:
    """Merge two experts; outputs stay equal if one of them was not in use; otherwise --lossy is needed."""
    from mmmoe_pretrain.surgery.merge import merge as make

    numbers = _numbers(chosen)
    if len(numbers) != 2:
        raise ValueError(f"--experts {chosen}: name two, e.g. 3,5")
    pair = numbers[0], numbers[1]
    _write(run, out, overrides, "merge", lambda source: make(source, layer, pair, lossy))


def align(
    run: Run,
    out: Out,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples to fit on.")] = 4096,
) -> None:
    """Set the joint heads of a run by linear CCA of its training samples; the result is a new run."""
    from mmmoe_pretrain.surgery.align import align as make

    _write(run, out, overrides, "align", lambda source: make(source, samples))


def extend(
    run: Run,
    out: Out,
    overrides: Overrides = None,
    add_experts: Annotated[int, typer.Option(min=0, help="New experts in each MoE layer, dormant at first.")] = 0,
    noise: Noise = 0.1,
    wake_steps: Annotated[int, typer.Option(help="Optimizer steps over which their dormancy falls to 0.")] = 1000,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", help="Beginning of names of weights that may be lost; repeat it."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples for optimizer.hold.importance=fisher.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Of these samples, whose squared gradients are added.")] = 16,
    lossy: Lossy = False,
) -> None:
    """Continue a run as another one with more modalities, objectives, data or experts; it begins at step 0."""
    from mmmoe_pretrain.surgery.extend import Estimate, Experts
    from mmmoe_pretrain.surgery.extend import extend as make

    experts = Experts(add_experts, noise, wake_steps, lossy)
    for line in make(run, out, overrides or [], experts, drop or [], Estimate(samples, batch_size)):
        print(line)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdigit()]
    if wrong:
        raise ValueError(f"--experts {text}: {wrong[0]!r} is not an expert; give numbers, e.g. 3,5")
    return tuple(int(part) for part in parts)


def _write(run: Path, out: Path, overrides: list[str] | None, command: str, make: Callable[[Source], Result]) -> None:
    from mmmoe_pretrain.surgery.operation import operate

    for line in operate(run, out, overrides or [], command, make):
        print(line)
