"""Every config of configs/methods, from training to evaluation: `make methods-walk`.

python -m tests.methods.walk                      all of them; the last line is "N passed, N failed"
python -m tests.methods.walk --only memory_queue  some

Each config is made small (evidence/quick.py) and trained on the corpus that ships with the repository: on one rank by
`mmmoe train`, and on two ranks with experts on both, as torchrun starts them. Each step must have the losses of one
rank, unless the method's entry in evidence/methods.py says why it is ``local``. Two ranks train again, one is killed
(SIGKILL) between checkpoints, and both resume: each step must log the losses of the run without a kill, and the
weights and optimizer state at the end must be the same bits. Then `mmmoe export` and `mmmoe evaluate` of the run that
was killed must work. Processes are forks of this one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import zip_longest
from pathlib import Path

import torch

from evidence import quick
from evidence.__main__ import make_data
from evidence.methods import METHODS
from evidence.pages import methods_of
from evidence.study import CONFIGS, ROOT, Method
from mmmoe_pretrain import cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import WholeState
from mmmoe_pretrain.config import RunConfig
from tests.chaos.kills import Kill
from tests.chaos.run import logged, start, steps_saved
from tests.distributed import free_port
from tests.layouts.matrix import LOSS
from tests.support import in_forks

STEPS, SAVE_EVERY, KILL_AT = 12, 3, 8  # steps; the save of step 6 has waited for that of step 3, so one is complete
SECONDS = 120.0  # that a command may take
EP2 = "parallel.expert_parallel_size=2"
# As in tests/layouts/cases.py, for whose runs the bound of losses was derived: with the default of 1e-8 Adam turns
# the rounding of a gradient that is next to nothing into a full step. One library of products, else runs measure it.
EXACT = ("optimizer.eps=1e-4", "train.cpu={products: torch}")


def configs() -> list[Path]:
    return sorted((ROOT / CONFIGS).glob("*.yaml"))


def entries() -> dict[str, Method]:
    """By the name of their config."""
    return {method.name: method for study in METHODS for method in methods_of(study)}


def small(path: Path, data: Path, runs: Path, *more: str) -> list[str]:
    """Overrides of the config at ``path``: a run in ``runs`` on the corpus in ``data``."""
    return [*quick.overrides(data), *quick.small(entries()[path.stem], data), *EXACT, f"runs_dir={runs}", *more]


def checks(path: Path, data: Path, folder: Path) -> dict[str, Callable[[], str]]:
    """What is checked of a config, in this order: each says what is wrong, or nothing."""
    steps = (f"train.steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", f"evaluate.every={SAVE_EVERY}",
             "train.log_every=1", "checkpoint.keep_last=2")  # fmt: skip
    of_one, of_two, of_killed = (
        small(path, data, folder, f"name={name}", *steps, *more)
        for name, more in (("one", ()), ("two", (EP2,)), ("killed", (EP2,)))
    )
    one, two, killed = (run_config.load(path, overrides) for overrides in (of_one, of_two, of_killed))
    is_local = bool(entries()[path.stem].local)
    return {
        "one rank": lambda: command(folder, "train", str(path), *of_one),
        "two ranks": lambda: problem_of_ranks(two),
        "local, as its entry says" if is_local else "equal losses": lambda: (
            "" if is_local else differing(logged(one), logged(two))
        ),
        "kill and resume": lambda: problem_after_kill(killed) or same(killed, two),
        "export": lambda: command(folder, "export", str(killed.run_dir), "--out", str(folder / "export")),
        "evaluate": lambda: command(folder, "evaluate", str(killed.run_dir)) or no_score(killed),
    }


def walk(path: Path, data: Path, folder: Path) -> tuple[list[str], str]:
    """The checks that a config passes, up to the first that it fails, and what is wrong there (nothing: empty)."""
    if path.stem not in entries():
        return [], f"evidence/methods.py has no method {path.stem}"
    passed: list[str] = []
    for name, problem_of in checks(path, data, folder).items():
        if problem := problem_of():
            return passed, f"{name}: {problem}"
        passed.append(name)
    return passed, ""


def command(folder: Path, *arguments: str) -> str:
    """Run ``mmmoe`` in a fork; the end of its output where it fails."""
    log = folder / f"{arguments[0]}.txt"

    def call() -> None:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_PORT": str(free_port()), "MMMOE_CACHE": str(folder / "indices")}
        sys.argv = ["mmmoe", *arguments]
        with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            cli.main()

    (code,) = in_forks(call, seconds=SECONDS)
    return "" if code == 0 else f"mmmoe {arguments[0]} ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}"


def problem_of_ranks(config: RunConfig, kill: Kill | None = None) -> str:
    """Train on two ranks to the end, or to ``kill``."""
    try:
        ended = start(config, 2, kill)
    except AssertionError as error:  # which has the end of the output
        return str(error)
    return "" if ended == ("killed" if kill else "done") else f"two ranks: {ended}"


def problem_after_kill(config: RunConfig) -> str:
    """Kill the run on its way, and let it resume."""
    if problem := problem_of_ranks(config, Kill(victim=1, steps=KILL_AT, seconds=0.0)):
        return problem
    if not 0 < steps_saved(config) < STEPS:
        return f"killed after the save of step {steps_saved(config)}, which shows nothing of resuming"
    return problem_of_ranks(config)


Losses = Sequence[tuple[int, dict[str, float]]]


def differing(one: Losses, two: Losses, steps: int = STEPS) -> str:
    """The first loss that is further off than sums in another order are."""
    if len(one) != steps or len(two) != steps:
        return f"{len(one)} and {len(two)} steps of {steps} have losses"
    for (step, losses), (_, others) in zip(one, two, strict=True):
        for name, value in losses.items():
            if not abs(value - others[name]) <= LOSS["fp32"] * max(1.0, abs(value)):
                return f"step {step}: {name} is {value!r} on one rank and {others[name]!r} on two"
    return ""


def same(resumed: RunConfig, whole: RunConfig) -> str:
    """Where the run that resumed is another: the losses of a step, or a bit of the state at its end."""
    for one, other in zip_longest(logged(resumed), logged(whole)):
        if one != other:
            return f"{one} after a kill, {other} without"
    found, wanted = (state_at_end(config) for config in (resumed, whole))
    wrong = [name for name, tensor in wanted.items() if name not in found or not torch.equal(found[name], tensor)]
    return f"other numbers after a kill in {', '.join(wrong)}"[:500] if wrong else ""


def state_at_end(config: RunConfig) -> WholeState:
    latest = store.find_latest(config.checkpoint_root)
    assert latest is not None and latest.step == STEPS
    return store.read_state(latest)


def no_score(config: RunConfig) -> str:
    results = json.loads((config.run_dir / "report.json").read_text(encoding="utf-8"))["results"]
    values = [row["value"] for row in results]
    return "" if values and all(map(math.isfinite, values)) else f"the report has the scores {values}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[path.stem for path in configs()], default=[])
    only = parser.parse_args().only
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(quick.CORPUS, data)
        for path in (path for path in configs() if not only or path.stem in only):
            (root := Path(folder) / path.stem).mkdir()
            passed, problem = walk(path, data, root)
            print(f"{path.stem:<24}{', '.join(passed)}{'; FAILED ' * bool(problem)}{problem}", flush=True)
            problems.append(problem)
    print(f"{problems.count('')} passed, {len(problems) - problems.count('')} failed")
    return 1 if any(problems) else 0


if __name__ == "__main__":
    sys.exit(main())
