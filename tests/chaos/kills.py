"""Ways to kill a rank: at a moment of the clock, or in the middle of a named operation of its own."""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Where a process may die, besides anywhere: while a file is flushed, made visible or removed, and around a load.
OPERATIONS = (
    "os.fsync",
    "os.replace",
    "shutil.rmtree",
    "mmmoe_pretrain.checkpoint.store.verify",
    "mmmoe_pretrain.checkpoint.store.load",
    "mmmoe_pretrain.checkpoint.save_plan.write_tensors",
    "mmmoe_pretrain.checkpoint.save_plan.commit",
    "mmmoe_pretrain.checkpoint.save_plan.point_to",
)
SPARE_STEPS = 6  # that an operation has to come to pass, before the clock kills


@dataclass(frozen=True)
class Kill:
    """Of rank ``victim``: ``seconds`` after it has done ``steps`` steps of this start; if ``operation`` is given,
    before or after its n-th call of that, if this comes sooner."""

    victim: int
    steps: int
    seconds: float
    operation: str = ""
    call: int = 1
    after: bool = False
    politely: bool = False  # the others get SIGTERM first, as torchrun does it

    @classmethod
    def draw(cls, rng: random.Random, ranks: int, steps: int, left: int) -> Kill:
        """Half of the kills by the clock, half within an operation; about ``steps`` steps after the start, and
        before the ``left`` steps of the run that are left are done."""
        at = rng.randint(0, min(2 * steps, max(0, left - 2)))  # 0: while it starts or loads
        operation = rng.choice(OPERATIONS) if rng.random() < 0.5 else ""
        call = rng.randint(1, 8) if operation.startswith("os.") else 1
        seconds = rng.uniform(0, 0.2 if at else 2.0)
        spare = min(SPARE_STEPS, max(0, left - 2 - at)) if operation else 0
        return cls(rng.randrange(ranks), at + spare, seconds, operation, call,
                   rng.random() < 0.5, rng.random() < 0.5)  # fmt: skip

    def arm(self) -> Callable[[int], None]:
        """On the rank to kill, before it trains: kill it at the operation. Call with every step: the number of steps
        since this start."""
        if self.operation:
            name, _, attribute = self.operation.rpartition(".")
            module = importlib.import_module(name)
            setattr(module, attribute, self._deadly(getattr(module, attribute)))

        def on_step(done: int) -> None:
            if done == self.steps:
                clock = threading.Timer(self.seconds, die)
                clock.daemon = True
                clock.start()

        on_step(0)
        return on_step

    def _deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls, rank = 0, os.getpid()

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                die(rank)
            result = function(*args, **kwargs)
            if calls == self.call:
                die(rank)
            return result

        return wrapper


def die(rank: int | None = None) -> None:
    """Kill the rank, and this process: it may be a data worker of the rank."""
    for pid in filter(None, (rank, os.getpid())):
        os.kill(pid, signal.SIGKILL)
