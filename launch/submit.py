"""``mmmoe-launch``: a run on Slurm, on Kubernetes or on this machine, by one command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmoe_pretrain.paths import given

if TYPE_CHECKING:
    from mmmoe_pretrain.config import RunConfig
    from mmmoe_pretrain.launch.profile import Profile
    from mmmoe_pretrain.launch.snapshot import Snapshot

JOB = "job.json"  # the last one of a run, beside its snapshots
EXAMPLE = "Example: mmmoe-launch configs/demo.yaml --on slurm --nodes 2 --profile cluster.yaml train.steps=1000"


class On(StrEnum):
    SLURM = "slurm"
    K8S = "k8s"
    LOCAL = "local"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE)
def launch(
    config: Annotated[Path, typer.Argument(callback=given, help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.steps=1000.")] = None,
    on: Annotated[On, typer.Option(help="Where it runs.")] = On.LOCAL,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes per machine; default: processes_per_node or gpus_per_node of --profile."),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--profile", help="YAML file with partition, image, environment, ... (docs/clusters.md)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and write nothing.")
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="First check the hosts of the job (mmmoe doctor).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit what does not fit the profile's GPUs, too.")] = False,
) -> None:
    """Submit a run, with a copy of the code and of the resolved config in its folder (RUN/launch)."""
    from mmmoe_pretrain.data.order.assign import microbatch_size
    from mmmoe_pretrain.launch import profile, slurm, snapshot
    from mmmoe_pretrain.parallel.layout import resolve_layout
    from mmmoe_pretrain.train.start import CONFIG, check_same_model, config_to_train

    told = profile.load(cluster) if cluster else profile.Profile()
    if on is On.LOCAL and nodes > 1:
        raise ValueError(
            f"--on local is this machine, and --nodes is {nodes}; over SSH start launch/torchrun.sh on each "
            f"(docs/clusters.md), or choose --on slurm or k8s"
        )
    run = config_to_train(config, overrides or [])
    given_count = processes or told.processes_per_node or _gpus(told, on)
    count = given_count or 1
    if given_count is None and on is not On.LOCAL:
        print("mmmoe-launch: 1 process per machine and no GPU, as the profile has no gpus_per_node", file=sys.stderr)
    microbatch_size(run, resolve_layout(run, nodes * count).data)
    if not overwrite and on is not On.K8S:  # whose folder is not here
        check_same_model(run, run.run_dir / CONFIG)
    options = [*["--preflight"] * preflight, *["--overwrite"] * overwrite]
    if told.gpu is not None:
        _refuse_too_large(run, nodes * count, told.gpu, force)
    if on is On.K8S:
        _on_kubernetes(told, run, nodes, count, options, dry_run)
        return
    taken = snapshot.new(run.run_dir)
    if on is On.LOCAL:
        _here(taken, run, count, options, dry_run)
        return
    job = slurm.job(told, run.name, nodes, count, taken, options)
    if dry_run:
        print(job.text)
        return
    _refuse_second(run)
    with taken.written(run):
        number = slurm.submit(job)
    (taken.folder.parent / JOB).write_text(json.dumps({"id": number}), encoding="utf-8")
    print(*slurm.how_to_follow(number, job.log), sep="\n")


def _refuse_too_large(run: RunConfig, ranks: int, gpu: str, force: bool) -> None:
    """Where the plan's peak memory of the fullest GPU is above its memory; a warning if ``force``."""
    from mmmoe_pretrain.plan.command import with_vocabulary
    from mmmoe_pretrain.plan.report import does_not_fit

    problem = does_not_fit(with_vocabulary(run)[0], ranks, gpu)
    if problem and force:
        print(f"mmmoe-launch: warning: {problem}; submitted all the same, by --force", file=sys.stderr)
    elif problem:
        raise ValueError(f"{problem}; mmmoe plan CONFIG --gpus {ranks} --gpu {gpu} --search lists layouts that fit, "
                         f"and --force submits it anyway")  # fmt: skip


def _gpus(told: Profile, on: On) -> int | None:
    if on is On.LOCAL:
        return None
    return told.slurm.gpus_per_node if on is On.SLURM else told.kubernetes.gpus_per_node


def _refuse_second(run: RunConfig) -> None:
    """Two jobs of one run would wait for each other's lock."""
    from mmmoe_pretrain.launch import slurm, snapshot

    path = run.run_dir / snapshot.FOLDER / JOB
    if not path.is_file():
        return
    try:
        number = str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} does not name the run's last job; if none is in the queue (squeue --me), delete that file"
        ) from error
    if state := slurm.state(number):
        raise ValueError(
            f"{run.run_dir} has job {number}, which is {state}; end it (scancel {number}), or give this run another "
            f"name="
        )


def _on_kubernetes(
    told: Profile, run: RunConfig, nodes: int, count: int, options: Sequence[str], dry_run: bool
) -> None:
    import yaml

    from mmmoe_pretrain.launch import kubernetes

    kubernetes.check(told, run)
    text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
    found = kubernetes.documents(told, run.name, nodes, count, text, options)
    for path in kubernetes.not_mounted(told, run):
        print(f"mmmoe-launch: {path} is in no claim of the profile: the image must have it", file=sys.stderr)
    if dry_run:
        print(kubernetes.text_of(found), end="")
        return
    print(kubernetes.submit(found, told, run.name), *kubernetes.how_to_follow(told, run.name), sep="\n")


def _here(taken: Snapshot, run: RunConfig, count: int, options: Sequence[str], dry_run: bool) -> None:
    from mmmoe_pretrain.launch.snapshot import search_path

    command = [str(taken.root / "launch" / "torchrun.sh"), str(count), "train", str(taken.config), *options]
    if dry_run:
        print(shlex.join(command))
        return
    taken.write(run)
    os.execve(command[0], command, {**os.environ, "PATH": search_path()})


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except ValueError as error:
        print(f"mmmoe-launch: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
