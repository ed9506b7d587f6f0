"""``mmmoe plan``: options, and what is asked for with them. Heavy imports wait until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmoe_pretrain.paths import given

if TYPE_CHECKING:
    from mmmoe_pretrain.config import RunConfig

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
EXAMPLE = "Example: mmmoe plan configs/mmmoe_30b_a3b.yaml --gpus 64 --gpu h100 --tokens 2T --search"


def plan(
    config: Annotated[Path | None, typer.Argument(callback=given, help="The run's YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. parallel.zero_stage=1.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Total number of GPUs, one per rank.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="h100 (default), h200, b200, gb200, a100 (80 GB), a100-40gb, mi300x or cpu.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB of one GPU, if not those of its kind.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: 8 (gb200: 72).")] = None,
    network: Annotated[
        str | None, typer.Option(help="Between nodes: a name, e.g. infiniband-400, or GB/s per GPU.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Token budget, e.g. 300B or 2T.")] = "1T",
    imbalance: Annotated[
        float, typer.Option(min=1, max=1000, help="Tokens of the most loaded expert rank over the mean.")
    ] = 1.0,
    machine: Annotated[
        Path | None, typer.Option(callback=given, help="File with measured efficiencies, written by --calibrate.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank all legal layouts.")] = False,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Compare two YAML files, or two sets of 'key=value key=value'.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and write the file of --machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate the memory, communication, time and energy of a run, without a GPU.

    Builds the real model on the meta device, in a process group without communication. Trains nothing. The data and
    the tokenizer need not exist.
    """
    from mmmoe_pretrain.parallel.layout import resolve_layout
    from mmmoe_pretrain.plan import command
    from mmmoe_pretrain.plan.links import refuse_split_groups
    from mmmoe_pretrain.plan.machines import find_machine
    from mmmoe_pretrain.plan.report import Asked

    if calibrate:
        if config is not None and machine is not None and machine.resolve() == config.resolve():
            raise ValueError(
                f"--machine {machine} is the config, which --calibrate would overwrite; name another file"
            )
        if said := command.calibrated(load(*_given(config, overrides)), machine):
            print(said)
        return
    if gpus is None:
        raise ValueError("--gpus is missing; give the number of GPUs, e.g. --gpus 64")
    known = find_machine(_one_machine(gpu, machine), gpus_per_node, network)
    if memory is not None:
        known = known.model_copy(update={"memory": 1e9 * memory})
    asked = Asked(gpus, known, budget_of(tokens), imbalance)
    if gpus_per_node is not None:
        refuse_split_groups(gpus, gpus_per_node)
    if compare and search:
        raise ValueError("--compare and --search cannot be given together; search each config by itself")
    if compare:
        first, second = (_one_of(config, overrides or [], each) for each in compare)
        if gpus_per_node is not None:
            for each in (first, second):
                refuse_split_groups(gpus, gpus_per_node, resolve_layout(each, gpus))
        _print(command.compared(asked, first, second, compare), as_json)
        return
    loaded = load(*_given(config, overrides))
    if gpus_per_node is not None and not search:
        refuse_split_groups(gpus, gpus_per_node, resolve_layout(loaded, gpus))
    answer = command.searched if search else command.planned
    _print(answer(asked, loaded), as_json)


def _one_machine(gpu: str | None, machine: Path | None) -> str:
    """A name or a path, of which one may be given."""
    if machine is None:
        return gpu or "h100"
    if gpu is not None:
        raise ValueError(f"--gpu {gpu} and --machine {machine} both name a machine; give one of them")
    if not machine.is_file():
        raise ValueError(f"--machine {machine}: there is no such file; mmmoe plan CONFIG --calibrate writes it")
    return str(machine)


def _print(answer: tuple[dict[str, Any], str], as_json: bool) -> None:
    values, text = answer
    print(json.dumps(values, allow_nan=False) if as_json else text)


def _given(config: Path | None, overrides: list[str] | None) -> tuple[Path, list[str]]:
    if config is None:
        raise ValueError("mmmoe plan needs a config, e.g. mmmoe plan configs/mmmoe_30b_a3b.yaml --gpus 64")
    return config, overrides or []


def _one_of(config: Path | None, overrides: list[str], given: str) -> RunConfig:
    """A side of --compare: a file, or overrides of CONFIG."""
    if Path(given).suffix in (".yaml", ".yml"):
        return load(Path(given), overrides)
    if config is None:
        raise ValueError(
            f"--compare {given!r} is not a YAML file; give two files, or a config to which the overrides apply"
        )
    return load(config, [*overrides, *given.split()])


def load(path: Path, overrides: list[str]) -> RunConfig:
    from mmmoe_pretrain import config as run_config

    return run_config.load(path, overrides)


def budget_of(text: str) -> float:
    """Tokens: a number, with K, M, B or T after it or not. Raises ValueError."""
    unit = UNITS.get(text[-1:].upper())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e18:
        raise ValueError(f"--tokens {text} is not a number of tokens; e.g. 300B, 2T or 1e12")
    return number
