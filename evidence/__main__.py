"""Trains the runs that the studies of docs/evidence.md (studies.py) or docs/methods.md (methods.py) lack, and writes
both pages and their pictures from the records.

    python -m evidence                       the studies of docs/evidence.md: hours; repeat it to continue
    python -m evidence --only captions       one study
    python -m evidence --page methods        those of docs/methods.md; --only NAME: one method and its baseline
    python -m evidence --render              the pages from the records that are there
    python -m evidence --list                the runs, and which of them have a record
    python -m evidence --quick               all studies in small, without a network: minutes; figures without meaning

Runs go to runs/evidence, a core each, records to evidence/records. Runs of another study that one shows are trained,
too. A run with a record is not repeated. Ctrl-C or SIGTERM ends runs at a checkpoint; the exit code is 75 then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence import page, quick, records
from evidence.methods import study
from evidence.pages import PAGES, Page
from evidence.records import Record
from evidence.runs import Runner, Task
from evidence.settings import changed
from evidence.study import ROOT, Study, Variant
from mmmoe_pretrain.exit_codes import STOPPED


@dataclass(frozen=True)
class Place:
    """Where a call keeps its runs, records and pages, and what holds for all of its runs."""

    runs: Path = ROOT / "runs" / "evidence"
    records: Path = records.FOLDER
    docs: Path = ROOT / "docs"
    readme: Path | None = ROOT / "README.md"
    data: Path | None = None  # None: where the configs have it
    extra: tuple[str, ...] = ()
    runner: type[Runner] = Runner


def quick_place(out: Path) -> Place:
    data = out / "data"
    return Place(out / "runs", out / "records", out, None, data, quick.overrides(data), quick.ForkingRunner)


def tasks_of(
    studies: Sequence[Study], place: Place, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Task]:
    """All runs that the studies show, with a record or without: the first seed of all variants before the second."""
    tasks = [
        _task(each, variant, seed, place)
        for each in studies
        for seed in each.seeds
        for variant in each.variants
        if (not only or variant.name in only) and (not seeds or seed in seeds)
    ]
    return list({task.name: task for task in tasks}.values())


def _task(of: Study, variant: Variant, seed: int, place: Place) -> Task:
    owner, name = of.owner_of(variant)
    of = of if owner == of.name else study(owner)
    variant = of.variant(name)
    small = quick.small(variant, place.data or Path()) if place.extra else ()
    return Task(of, variant, seed, place.runs, (*place.extra, *small))


def record_path(task: Task, place: Place) -> Path:
    return records.path_of(task.study.name, task.variant.name, task.seed, place.records)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", choices=PAGES, default="evidence", help="whose studies; default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], help="studies, or methods")
    parser.add_argument("--variants", nargs="+", default=[], help="only these of each study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--render", action="store_true", help="train nothing")
    parser.add_argument("--list", action="store_true", help="the runs, and which of them have a record")
    parser.add_argument("--quick", action="store_true", help="all in small")
    parser.add_argument("--out", type=Path, help=f"of --quick: its folder; default: {quick.OUT.relative_to(ROOT)}")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Errors that a user can fix print one line."""
    args = arguments(given)
    try:
        chosen, place = PAGES[args.page], Place()
        if args.only:
            chosen = chosen.of(args.only)
        check(chosen.studies, args)
        if args.quick:
            chosen = replace(chosen, studies=quick.studies_of(chosen.studies), head=quick.HEAD.format(chosen.title))
            place = quick_place((args.out or quick.OUT).resolve())
        written = [chosen] if args.quick else list(PAGES.values())
        if args.list:
            for each in [chosen] if args.only else written:
                show(each.studies, place, args.variants)
        elif args.render:
            render(written, place)
        else:
            train(chosen.studies, written, place, args)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"evidence: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def check(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that name nothing."""
    for wanted, known, what in (
        (args.variants, {variant.name for each in studies for variant in each.variants}, "variant"),
        (args.seeds, {seed for each in studies for seed in each.seeds}, "seed"),
    ):
        for name in wanted:
            if name not in known:
                there, where = ", ".join(map(str, sorted(known))), ", ".join(each.name for each in studies)
                raise ValueError(f"there is no {what} {name} in {where}; there are {there}")
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} trains nothing; give 1 or more")
    if args.out is not None and not args.quick:
        raise ValueError("--out is of --quick; full runs have their places in runs/, evidence/records and docs/")
    if args.out is not None:
        quick.check_folder(args.out)


def made_with_other_settings(studies: Sequence[Study], place: Place) -> Iterator[tuple[Task, Record, list[str]]]:
    """The records that were made with other settings than their study has now, and those settings."""
    for task in tasks_of(studies, place):
        if (path := record_path(task, place)).is_file():
            record = records.read(path)
            if changes := changed(record.config, task.config()):
                yield task, record, changes


def show(studies: Sequence[Study], place: Place, variants: Collection[str] = ()) -> None:
    """The variants of these names, or all."""
    for each in studies:
        for variant in each.variants:
            if variants and variant.name not in variants:
                continue
            owner, name = each.owner_of(variant)
            known = [seed for seed in each.seeds if records.path_of(owner, name, seed, place.records).is_file()]
            of = f" (runs of {variant.same_as})" if variant.same_as else ""
            print(f"{each.name:<20}{variant.name:<24}seeds with a record: {', '.join(map(str, known)) or 'none'}{of}")
    for task, _, changes in made_with_other_settings(studies, place):
        print(f"{task.name} was made with other settings: {'; '.join(changes)}")


def render(pages: Sequence[Page], place: Place) -> None:
    """The pages, which also say what was made with other settings."""
    for each in pages:
        print(each.write(place.docs, place.records, each.studies, remarks(each.studies, place), each.head))
    if place.readme is not None:
        page.write_readme(place.readme, place.records)


def remarks(studies: Sequence[Study], place: Place) -> dict[str, list[str]]:
    """What each study shows that was made with other settings."""
    found: dict[str, list[str]] = {}
    for each in studies:
        for task, record, changes in made_with_other_settings([each], place):
            told = f"Recorded with other settings than the study has now: {task.variant.label}, seed {record.seed} ("
            found.setdefault(each.name, []).append(f"{told}{'; '.join(changes)}).")
    return found


def train(studies: Sequence[Study], pages: Sequence[Page], place: Place, args: argparse.Namespace) -> None:
    wanted = tasks_of(studies, place, args.variants, args.seeds)
    tasks = [task for task in wanted if not record_path(task, place).is_file()]
    print(f"{len(tasks)} runs to train of {len(wanted)}, {args.jobs} at a time", flush=True)
    for corpus in [quick.CORPUS] * bool(tasks) if args.quick else dict.fromkeys(task.study.corpus for task in tasks):
        make_data(corpus, place.data)
    if args.quick:
        quick.import_once()
    runner = place.runner(args.jobs, place.records)
    stopped = False
    with handling(lambda *_: runner.stop()):
        for task, path in runner.run(tasks):
            stopped = stopped or path is None
            print(f"{task.name}: {path or 'stopped; repeat the command to continue it'}", flush=True)
    render(pages, place)
    if stopped:
        sys.exit(STOPPED)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, ``handler`` gets SIGINT and SIGTERM."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def make_data(corpus: str, out: Path | None) -> None:
    """Raises RuntimeError where it fails; it has said why then."""
    command = [str(ROOT / "evidence" / "data.sh"), corpus, *([str(out)] if out else [])]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # has mmmoe-data
    stopped: list[int] = []
    with subprocess.Popen(command, env={**os.environ, "PATH": path}, start_new_session=True) as process:

        def stop(number: int, _: object) -> None:
            stopped.append(number)
            os.killpg(process.pid, signal.SIGTERM)

        with handling(stop):
            code = process.wait()
    if stopped:
        sys.exit(STOPPED)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see above")


if __name__ == "__main__":
    main()
