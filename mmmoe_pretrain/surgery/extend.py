"""``mmmoe extend``: a trained run goes on as another run, which has what its overrides and ``--add-experts`` add:
modalities, objectives, representations, other data, experts.

A parameter or buffer that RUN has by the same name and shape is RUN's; others begin as in any new run, from seed and
name. What would be lost is refused by name unless ``--drop`` names it, and so is another shape. The new run begins
at step 0, with moments of zero and its own schedule: one count of updates serves all parameters of an optimizer, and
with RUN's count the first steps of new parameters would be too long, several times with beta2 0.999 (Adam divides by
the root of a second moment that is not corrected any more).

Where ``optimizer.hold`` pulls to RUN's weights, they are the anchor, and importance is written here: 0 for all that
is new, the rows of new experts included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.checkpoint.model import CONFIG, TOKENIZER, meta_of_new_run, with_tokenizer, write_first
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.optimizer import IMPORTANCE
from mmmoe_pretrain.modalities import build_modalities, copy_tokenizer
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.paths import new_folder
from mmmoe_pretrain.surgery.add import add
from mmmoe_pretrain.surgery.fisher import fisher
from mmmoe_pretrain.surgery.operation import RECORD, Result, Source, read_source, summary, with_files
from mmmoe_pretrain.surgery.parameters import Parameter, State, by_key, fresh
from mmmoe_pretrain.surgery.probe import largest_difference, noise_batch
from mmmoe_pretrain.surgery.settings import check_spread, moe_layers, named

SHOWN = 4  # names in a line for people; surgery.json has all


@dataclass(frozen=True)
class Experts:
    """``count`` new experts of each MoE layer, as ``mmmoe experts add`` makes them."""

    count: int = 0
    noise: float = 0.1
    wake_steps: int = 1000
    lossy: bool = False


@dataclass(frozen=True)
class Estimate:
    """Of the Fisher information: over about ``samples`` training samples of RUN, in batches of ``batch_size``."""

    samples: int = 512
    batch_size: int = 16


def extend(
    run_dir: Path,
    out: Path,
    overrides: Sequence[str] = (),
    experts: Experts = Experts(),
    dropped: Sequence[str] = (),
    estimate: Estimate = Estimate(),
) -> list[str]:
    """Make the run ``out`` of the newest checkpoint of ``run_dir``, which does not change; what was done, for people.
    ``dropped``: beginnings of the names that may be lost. Raises ValueError where something does not fit, and where
    outputs that both runs have differ; nothing is written then."""
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    source = read_source(run_dir)
    grown = _grown(source, experts)
    with new_folder(out) as draft:
        config, fingerprint = _config_of(source, grown.config, overrides, draft, out)
        state, lines = _state(source, grown, config, dropped)
        if config.optimizer.pull:
            lines.append(_weigh(source, grown.state, config, state, estimate))
        write_first(config, draft, 0, by_key(state), meta_of_new_run(config, fingerprint))
        run_config.dump(config, draft / CONFIG)
        result = replace(grown, config=config, exact=grown.exact and not _shares_room(source.config, config))
        batches = noise_batch(source.config), noise_batch(source.config, config)
        largest = largest_difference(source.model, load_model(draft)[0], *batches)
        allowed = replace(result, allowed="as experts with limited room have other tokens, or as --lossy allows")
        lines += [*grown.did, summary(allowed, largest, "what both runs have, a batch of noise", "extend")]
        record = {"command": "extend", "source": str(run_dir), "step": source.step, "did": lines,
                  "largest_difference": largest, "added": sorted(state.keys() - source.state.keys()),
                  "dropped": sorted(source.state.keys() - state.keys())}  # fmt: skip
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return [*lines, f"wrote {out}, at step 0 of {config.train.steps}; train it with: mmmoe train {out / CONFIG}"]


def _grown(source: Source, experts: Experts) -> Result:
    """RUN with new experts. Its optimizer's state is a mark alone: 1 where a number is of RUN, 0 where it is new."""
    parameters = _parameters(source.config)
    marked = {
        name: Parameter(its.value, {IMPORTANCE: torch.ones_like(its.value)} if name in parameters else {})
        for name, its in source.state.items()
    }
    if not experts.count:
        return Result(source.config, marked, ())
    source = replace(source, state=marked)
    return add(source, experts.count, None, (), experts.noise, experts.wake_steps, experts.lossy)


def _parameters(config: RunConfig) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in PretrainingModel(config).named_parameters()}


def _config_of(
    source: Source, grown: RunConfig, overrides: Sequence[str], draft: Path, out: Path
) -> tuple[RunConfig, str]:
    """The config of the new run, and the fingerprint of its tokenizer, of which ``draft`` gets a copy."""
    run_config.dump(grown, draft / CONFIG)
    config = named(run_config.load(draft / CONFIG, tuple(overrides)), out).with_files()
    _refuse_other_inputs(source.config, config)
    check_spread(config)
    before = source.meta["tokenizer_fingerprint"] if source.config.model.vocab_size else ""
    modalities = build_modalities(config.modalities, config.data.tokenizer, fingerprint=before)
    config = config.with_vocabulary(modalities.vocab_size)
    if modalities.vocab_size and config.data.tokenizer is not None:
        copy_tokenizer(config.data.tokenizer, draft / TOKENIZER, modalities.fingerprint)
        config = with_tokenizer(config, out / TOKENIZER)
    return with_files(config, draft, out), modalities.fingerprint


def _refuse_other_inputs(old: RunConfig, new: RunConfig) -> None:
    """Settings of what both have that would change what weights mean, at equal names and shapes."""
    for section in ("modalities", "representations"):
        before, after = getattr(old, section), getattr(new, section)
        for name in before.keys() & after.keys():
            if before[name].of_the_model() != after[name].of_the_model():
                raise ValueError(
                    f"the overrides change {section}.{name}, which the run was trained with; leave them out, or add "
                    f"one of another name"
                )
    was, now = (objectives_of(config).classifying for config in (old, new))
    for name in was.keys() & now.keys():
        if was[name].classes != now[name].classes or was[name].representations != now[name].representations:
            raise ValueError(
                f"the overrides change of or classes of objectives.{name}, by which the run has trained its head; "
                f"leave them out, or add an objective of another name"
            )


def _state(source: Source, grown: Result, config: RunConfig, dropped: Sequence[str]) -> tuple[State, list[str]]:
    """The state of the new run, without importance, and what is kept, added and lost."""
    model = PretrainingModel(config)
    parameters, old = dict(model.named_parameters()), grown.state
    begun: Mapping[str, Tensor] = {**parameters, **persistent_buffers(model)}
    lost = sorted(old.keys() - begun.keys())
    _refuse_lost(lost, dropped, source.run_dir)
    state, resized = {}, []
    for name, value in begun.items():
        if name in old and old[name].value.shape == value.shape:
            value = old[name].value
        elif name in old and name not in parameters and name.startswith("tasks."):
            resized.append(name)  # what an objective keeps from step to step, in another size
        elif name in old:
            raise ValueError(
                f"{name} has the shape {list(old[name].value.shape)} in {source.run_dir} and {list(value.shape)} in "
                f"the new run; leave the overrides of model, moe and of the sizes of what it had out"
                + ("; experts are added by --add-experts N" if ".ffn." in name else "")
            )
        state[name] = fresh(value.detach().clone(), config.optimizer.state if name in parameters else ())
    new = sorted(begun.keys() - old.keys())
    lines = [f"{len(begun) - len(new) - len(resized)} of {len(begun)} tensors are those of step {source.step}"]
    for what, names in (("new", new), ("dropped", lost), ("of another size, begin empty", resized)):
        lines += [f"{what}: {_named(names)}"] if names else []
    return state, lines


def _refuse_lost(lost: Sequence[str], dropped: Sequence[str], run_dir: Path) -> None:
    for prefix in dropped:
        if not any(name.startswith(prefix) for name in lost):
            would = _named(lost) or "nothing at all"
            raise ValueError(f"--drop {prefix}: nothing of this name would be lost ({would})")
    left = [name for name in lost if not name.startswith(tuple(dropped))]
    if left:
        raise ValueError(
            f"the new run has no {_named(left)}, which {run_dir} has; keep the objectives, modalities and "
            f"representations that they belong to, or let them go with --drop {left[0]}"
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _weigh(source: Source, grown: State, config: RunConfig, state: State, estimate: Estimate) -> str:
    """Write the importance of RUN's weights into ``state``; how, for people."""
    hold = config.optimizer.hold
    assert hold is not None
    marks = {name: grown[name].optimizer[IMPORTANCE].bool() for name in state if grown.get(name, _NO).optimizer}
    if hold.importance == "uniform":
        for name, mark in marks.items():
            state[name].optimizer[IMPORTANCE].copy_(mark)
        return "importance 1 of every weight of the run"
    found, count = fisher(source, estimate.samples, estimate.batch_size)
    for name, mark in marks.items():
        before = source.state[name].optimizer.get(IMPORTANCE)
        total = found[name] if before is None else found[name] + hold.kept * before
        state[name].optimizer[IMPORTANCE].masked_scatter_(mark, total)  # in order: new rows lie between or behind
    return f"importance by the Fisher information of {count:,} training samples, in batches of {estimate.batch_size}"


_NO = Parameter(torch.empty(0))


def _shares_room(old: RunConfig, new: RunConfig) -> bool:
    """Experts take a part of all tokens, and other objectives pack others."""
    limited = any(its.moe.router == "expert_choice" or its.moe.capacity_factor is not None for its in moe_layers(new))
    same = objectives_of(old).losses == objectives_of(new).losses and old.representations == new.representations
    return limited and not same
