"""Trains a variant of a study, or continues it, by mmmoe train in a process of its own, scores it by mmmoe evaluate
where the study asks for that, and records it.

A run lives in a folder of its own, which has its log and, in core_seconds.json, its cost so far.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pydantic import ValidationError

from evidence import records
from evidence.lifelong import of_reports
from evidence.records import Machine, Point, Record
from evidence.settings import refuse_other_settings
from evidence.study import ROOT, TEST, TOWERS, TRAINER, Study, Variant
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import explain
from mmmoe_pretrain.evaluate import report
from mmmoe_pretrain.evaluate.routing_report import specialisation
from mmmoe_pretrain.export.layout import Weight, parameter_counts
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.train.journal import EVENTS
from mmmoe_pretrain.untrusted import read_json

COST = "core_seconds.json"  # in a run's folder
LOG = "log.txt"
LAST_LINES = 20  # of the log of a run that failed
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a run has one core
# A run ends with the harness, also where that is killed, before or after the run asks for it.
START = """import os, sys
from {program} import main
from mmmoe_pretrain import exit_codes
exit_codes.end_with_parent()
if os.getppid() == {parent}:
    main()
"""


@dataclass(frozen=True)
class Task:
    """A run to train. ``extra``: overrides that hold for all runs of a call."""

    study: Study
    variant: Variant
    seed: int
    runs_dir: Path
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.study.name}-{self.variant.name}-seed{self.seed}"

    @property
    def path(self) -> Path:
        """Of its config's file."""
        return self.study.path_of(self.variant)

    @property
    def settings(self) -> list[str]:
        """Overrides, without those of the run's name and place."""
        last = self.variant.stages[-1].overrides if self.variant.stages else ()
        return [*self.variant.overrides, *last, *self.extra]

    @property
    def overrides(self) -> list[str]:
        return [*self.settings, f"name={self.name}", f"seed={self.seed}", f"runs_dir={self.runs_dir}"]

    def config(self) -> RunConfig:
        return run_config.load(self.path, self.overrides)

    def before(self) -> Task | None:
        """The run that this one is made of (``studies.Start``); None for a run from the first step. Its learning
        rate follows the schedule of the whole."""
        start = self.variant.start
        if start is None:
            return None
        steps = self.config().train.steps
        own = (f"train.steps={max(1, round(start.share * steps))}", f"optimizer.decay_steps={steps}")
        variant = Variant(f"{self.variant.name}-start", "", start.overrides)
        return Task(self.study, variant, self.seed, self.runs_dir, (*self.extra, *own, "evaluate.every=0"))

    def sequence(self) -> list[Task]:
        """The runs of a sequence, this one last; of others this one alone."""
        of = self.variant
        early = [
            Variant(f"{of.name}-stage{number}", "", (*of.overrides, *stage.overrides))
            for number, stage in enumerate(of.stages[:-1], start=1)
        ]
        return [*(replace(self, variant=variant) for variant in early), self]

    def earlier(self) -> list[Task]:
        """The runs that this one is made of, the first one first."""
        before = self.before()
        return self.sequence()[:-1] if before is None else [before]

    def calls(self) -> list[Call]:
        """The commands that are left to run, one after the other."""
        if self.variant.stages:
            return self._of_stages()
        folder = self.config().run_dir
        score = [Call(TRAINER, ("evaluate", str(folder)), folder)] if self.study.evaluated else []
        return [*self._training(), *score]

    def _of_stages(self) -> list[Call]:
        calls, made_of = [], Path()
        for run, stage in zip(self.sequence(), self.variant.stages, strict=True):
            folder = run.config().run_dir
            if made_of != Path() and not folder.exists():
                change = ("extend", str(made_of), "--out", str(folder), *stage.options, *run.settings)
                calls.append(Call(TRAINER, change, made_of))
            calls.append(Call(TRAINER, ("train", str(run.path), *run.overrides), folder))
            if not (folder / report.JSON).is_file():
                calls.append(Call(TRAINER, ("evaluate", str(folder)), folder))
            made_of = folder
        return calls

    def _training(self) -> list[Call]:
        config, before, start = self.config(), self.before(), self.variant.start
        train = Call(self.variant.program, ("train", str(self.path), *self.overrides), config.run_dir)
        if before is None or start is None or config.run_dir.exists():
            return [train]
        (first,) = before._training()
        settings = (f"train.steps={config.train.steps}", f"evaluate.every={config.evaluate.every}")
        whole = (*settings, "optimizer.decay_steps=null")  # which is train.steps
        change = (*start.command, str(first.folder), "--out", str(config.run_dir), *whole)
        return [first, Call(TRAINER, change, first.folder), train]


@dataclass(frozen=True)
class Call:
    """A command line of ``program``, whose log and cost are kept in ``folder``."""

    program: str
    arguments: tuple[str, ...]
    folder: Path


@dataclass
class Runner:
    """Trains tasks, ``jobs`` at a time, each on one core; ``stop`` ends them at a checkpoint."""

    jobs: int
    records: Path
    _running: list[int] = field(default_factory=list)  # process ids
    _stopping: bool = False

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Path | None]]:
        """Each task with its record as it ends; None where ``stop`` came first. Raises RuntimeError where one fails,
        after the others have stopped."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._one, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Runs save and end; those that have not begun never do."""
        self._stopping = True
        for process in list(self._running):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGTERM)

    def _one(self, task: Task) -> Path | None:
        code_version = commit()
        for number, run in enumerate([*task.earlier(), task]):
            config = run.config()
            if not number or (config.run_dir / EVENTS).is_file():  # what a command made has a tokenizer of its own
                refuse_other_settings(config)
        for call in task.calls():
            if not self._ended(call, task.name):
                return None
        return records.write(record_of(task, code_version), self.records)

    def _ended(self, call: Call, name: str) -> bool:
        """Run it; False where ``stop`` came first. Raises RuntimeError where it fails."""
        if self._stopping:
            return False
        call.folder.mkdir(parents=True, exist_ok=True)
        cost, path = Cost(call.folder / COST), call.folder / LOG
        cost.begin()
        with path.open("ab") as log:
            process = self._start(call, log)
            self._running.append(process)
            if self._stopping:  # since the check above
                self.stop()
            _, status, used = os.wait4(process, 0)
            self._running.remove(process)
        code = os.waitstatus_to_exitcode(status)
        if code in (exit_codes.DONE, exit_codes.STOPPED):  # it is done, or has saved
            cost.end(used.ru_utime + used.ru_stime)
        elif self._stopping and code == -signal.SIGTERM:  # before it could train, or in its evaluation
            cost.end(0.0)  # all of which is computed again
        if code != exit_codes.DONE and not self._stopping:
            tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            raise RuntimeError(f"{name} ended with {code}; the end of {path}:\n" + "\n".join(tail))
        return code == exit_codes.DONE

    def _start(self, call: Call, log: BinaryIO) -> int:
        """The process of a command line. It has a session of its own, so that Ctrl-C in a terminal
        reaches this process alone: a second signal would end a run before it has saved."""
        started = subprocess.Popen(
            [sys.executable, "-c", START.format(program=call.program, parent=os.getpid()), *call.arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        started.returncode = 0  # os.wait4 waits for it, and Popen must not
        return started.pid


class Cost:
    """CPU seconds of all starts of a run, kept in its folder. Unknown once a start was not ended by ``end``: it was
    killed or failed, and what it had computed since its last checkpoint was computed again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = read_json(path) if path.is_file() else {}
        known = found.get("seconds") if not found.get("running") else None
        self.seconds: float | None = known if path.with_name(EVENTS).is_file() else 0.0  # else it has not begun

    def begin(self) -> None:
        self._write(running=True)

    def end(self, seconds: float) -> None:
        if self.seconds is not None:
            self.seconds += seconds
        self._write(running=False)

    def _write(self, running: bool) -> None:
        draft = self._path.with_name(self._path.name + ".tmp")
        draft.write_text(json.dumps({"seconds": self.seconds, "running": running}), encoding="utf-8")
        draft.replace(self._path)


def record_of(task: Task, code_version: str) -> Record:
    """Of a run that has ended; ``code_version``: the commit that it ran. Raises ValueError where it has no scores at
    its end, or some that are no numbers, and where its evaluation is missing, damaged or of an earlier step."""
    config, earlier = task.config(), task.earlier()
    saved, lines = _of_run(config.run_dir)
    total, active = _parameters(saved, task.variant.program)
    scored = [line for line in lines if "held_out" in line]
    if not scored or scored[-1]["step"] != config.train.steps:
        raise ValueError(f"{config.run_dir}/metrics.jsonl has no held-out scores of step {config.train.steps}")
    trained = [_trained(run.config().run_dir) for run in earlier]
    points = [_point(line) for line in scored]
    if task.study.evaluated:
        points[-1] = replace(points[-1], scores={**points[-1].scores, **_evaluation(config)})
    if task.study.groups:
        reports = [report.read(run.config().run_dir) for run in task.sequence()]
        found = of_reports(reports, task.study.groups, task.study.scored)
        points[-1] = replace(points[-1], scores={**points[-1].scores, **found})
    values, routing = saved.model_dump(mode="json"), scored[-1]["routing"]  # with the defaults, which may change
    try:
        return Record(
            study=task.study.name,
            variant=task.variant.name,
            seed=task.seed,
            date=datetime.now(UTC).date().isoformat(),
            commit=code_version,
            machine=machine(),
            config={key: value for key, value in values.items() if key != "runs_dir"},
            parameters=total,
            active_parameters=active,
            flops_per_token=round(model_costs(saved).training, 1),
            core_seconds=_core_seconds([*earlier, task]),
            points=points,
            load=[layer["load"] for layer in routing],
            dropped=[layer["dropped"] for layer in routing],
            before_tokens=sum(tokens for tokens, _ in trained),
            before_flops=round(sum(flops for _, flops in trained), 1),
        )
    except ValidationError as error:
        raise ValueError(f"{config.run_dir}/metrics.jsonl: {explain(error)[0]}; the run has diverged") from None


def _of_run(folder: Path) -> tuple[RunConfig, list[dict[str, Any]]]:
    """Its config and its metrics."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return run_config.load(folder / "config.yaml"), [json.loads(line) for line in text.splitlines()]


def _trained(folder: Path) -> tuple[int, float]:
    """The tokens and FLOPs of a run so far."""
    config, lines = _of_run(folder)
    tokens = lines[-1]["tokens_total"]
    return tokens, model_costs(config).training * tokens


def _core_seconds(tasks: Sequence[Task]) -> float | None:
    """Of all of them; None where one is not known."""
    costs = [Cost(task.config().run_dir / COST).seconds for task in tasks]
    known = [seconds for seconds in costs if seconds is not None]
    return round(sum(known), 1) if len(known) == len(costs) else None


def _evaluation(config: RunConfig) -> dict[str, float]:
    """The scores of mmmoe evaluate at the end of a run."""
    found = report.read(config.run_dir)
    if found.step != config.train.steps:
        raise ValueError(
            f"{config.run_dir / report.JSON} is of step {found.step}, and the run has {config.train.steps} steps; "
            f"write it with mmmoe evaluate {config.run_dir}"
        )
    return {f"{TEST}{row['metric']}": row["value"] for row in found.results}


def _point(line: dict[str, Any]) -> Point:
    layers, found = line["routing"], line["held_out"]
    return Point(
        step=line["step"],
        tokens=line["tokens_total"],
        scores={**found["losses"], **found["scores"]},
        specialisation=[round(_specialisation(layer), 4) for layer in layers],
        largest_load=[max(layer["load_over_even"]) for layer in layers],
    )


def _specialisation(layer: dict[str, Any]) -> float:
    """0 where one modality alone has tokens."""
    counts_ME = np.array([layer["load"][name] for name, tokens in layer["tokens"].items() if tokens])
    return specialisation(counts_ME) or 0.0


def _parameters(config: RunConfig, program: str) -> tuple[int, int]:
    """All, and those that a token meets: of towers one."""
    with torch.device("meta"):
        model = PretrainingModel(config)
    weights = [Weight(name, tuple(p.shape), p.dtype, True) for name, p in model.named_parameters()]
    total, active = parameter_counts(config, weights)
    others = len(config.stream_names.modalities) - 1 if program == TOWERS else 0
    return total + others * sum(p.numel() for p in model.mmmoe.trunk.parameters()), active


def commit() -> str:
    """Of the checkout; with a + where tracked files were changed since."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True).stdout

    try:
        edited = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!evidence/records", ":!docs")
        return git("rev-parse", "HEAD").strip() + ("+" if edited.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> Machine:
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return Machine(cpu=model, cores=len(os.sched_getaffinity(0)), torch=torch.__version__)
