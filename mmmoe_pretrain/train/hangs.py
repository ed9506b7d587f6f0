"""When a job counts as hanging, and the one message that says who waits for whom. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from mmmoe_pretrain.train.heartbeats import Beat

# How often faults.hang_minutes a rank may go without progress in phases that are slow and legal.
ALLOWANCE = {
    "start": 10.0,  # building the model and the engine
    "compile": 10.0,  # the first step of a process
    "load": 10.0,
    "save": 10.0,
}
STEPS = 3.0  # times the slowest step before it that a step may take: many microbatches, each of them quick


def allowed(beat: Beat, limit: float) -> float:
    """Seconds without progress in the phase of ``beat``, ``limit`` being those of a plain one."""
    if beat.phase == "step":
        return max(limit, STEPS * beat.longest)
    return limit * ALLOWANCE.get(beat.phase, 1.0)


def silent_ranks(beats: Mapping[int, Beat], silence: Mapping[int, float], limit: float) -> list[int]:
    """Those whose beat has not changed for too long and that have not said goodbye. No phase is an excuse: the
    thread that publishes runs in all of them."""
    return [rank for rank, beat in beats.items() if not beat.left and silence[rank] > limit]


def stalled_ranks(beats: Mapping[int, Beat], limit: float) -> list[int]:
    """Those without progress for too long; none as long as a rank is within the allowance of a slow phase, for
    the others may wait for it."""
    here = [beat for beat in beats.values() if not beat.left]
    if any(limit < allowed(beat, limit) >= beat.age for beat in here):
        return []
    return [beat.rank for beat in here if beat.age > allowed(beat, limit)]


def waited_for(beats: Mapping[int, Beat], silent: Collection[int]) -> tuple[list[int], str]:
    """The ranks that hold up the others, as far as the beats tell, and by what they are known."""
    if silent:
        return sorted(silent), "silent: stopped, dead, or stuck outside Python"
    gone = sorted(rank for rank, beat in beats.items() if beat.left)
    if gone:
        return gone, "has left"
    furthest = max((beat.position for beat in beats.values()), default=(0, 0))
    behind = sorted(rank for rank, beat in beats.items() if beat.position < furthest)
    if behind:
        return behind, "behind the others"
    outside = sorted(rank for rank, beat in beats.items() if not beat.waits_in)
    if outside and len(outside) < len(beats):
        return outside, "in no collective, as the others are"
    return [], ""


def describe(reason: str, beats: Mapping[int, Beat], silent: Collection[int], code: int, folder: str) -> str:
    """The message: why the job ends, whom the others wait for, and where each group of ranks stands.

    ``silent``: ranks of ``beats`` that did not answer at the end.
    """
    lines = [f"The job hangs: {reason}. It ends with exit code {code}; the stacks of all ranks are in {folder}."]
    culprits, why = waited_for(beats, silent)
    if culprits:
        lines.append(f"The others wait for {_named(culprits)} ({why}).")
    else:
        lines.append("No rank is behind the others: all wait, maybe for each other; compare their flight records.")
    groups: dict[tuple[bool, tuple[int, int], tuple[str, str]], list[Beat]] = defaultdict(list)
    for rank, beat in sorted(beats.items()):
        groups[rank not in culprits, beat.position, _state(beat, rank in silent)].append(beat)
    for (_, _, (before, after)), members in sorted(groups.items(), key=lambda item: item[0]):
        ages = sorted({round(beat.age) for beat in members})
        told = f"{ages[0]} to {ages[-1]}" if len(ages) > 1 else f"{ages[0]}"
        lines.append(f"  {_named([beat.rank for beat in members])}: {before} for {told} s{after}")
    return "\n".join(lines)


def _state(beat: Beat, silent: bool) -> tuple[str, str]:
    """What to say before and after the seconds without progress."""
    place = f'step {beat.step}, "{beat.phase}"'
    if beat.left:
        return f"left: {beat.left}; before, in {place}", ""
    if silent:
        return f"last heard of in {place}", " then"
    stand = ", ".join(filter(None, [beat.waits_in and f"in {beat.waits_in}", beat.where and f"at {beat.where}"]))
    return f"in {place}", f", {stand}" if stand else ""


def _named(ranks: Sequence[int]) -> str:
    """E.g. "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} {', '.join('-'.join(map(str, run)) for run in runs)}"
