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
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all, one a rank.")] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, gb200, a100, mi300x or cpu.")] = "h100",
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: as the kind is sold.")] = None,
    network: Annotated[str | None, typer.Option(help="Across nodes: a name or bytes a second of a GPU.")] = None,
    tokens: Annotated[str, typer.Option(help="Budget of tokens, e.g. 300B or 2T.")] = "1T",
    imbalance: Annotated[
        float, typer.Option(min=1, max=1000, help="Rows of the fullest expert rank over the mean.")
    ] = 1.0,
    machine: Annotated[
        Path | None, typer.Option(callback=given, help="Measured efficiencies, of --calibrate.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank all legal layouts.")] = False,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two YAML files, or two sets of 'key=value key=value'.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine into the file of --machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run needs and how fast it is, without a GPU: parameters, memory, communication, time and energy.

    The real model is built on the device meta in a process group without communication. Nothing is trained, and the
    data and the tokenizer need not be there.
    """
    from mmmoe_pretrain.plan import command
    from mmmoe_pretrain.plan.machines import find_machine
    from mmmoe_pretrain.plan.report import Asked

    if calibrate:
        print(command.calibrated(load(*_given(config, overrides)), machine))
        return
    if gpus is None:
        raise ValueError("--gpus is missing; say on how many GPUs the run is planned, e.g. --gpus 64")
    known = find_machine(str(machine or gpu), gpus_per_node, network)
    asked = Asked(gpus, known, budget_of(tokens), imbalance)
    if compare:
        first, second = (_one_of(config, overrides or [], each) for each in compare)
        _print(command.compared(asked, first, second, compare), as_json)
        return
    answer = command.searched if search else command.planned
    _print(answer(asked, load(*_given(config, overrides))), as_json)


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
        raise ValueError(f"--compare {given!r} is no YAML file; name two files, or give a config for its overrides")
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
        raise ValueError(f"--tokens {text} is no number of tokens; e.g. 300B, 2T or 1e12")
    return number
