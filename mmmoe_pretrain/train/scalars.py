"""The numbers of a record by the names that they have in TensorBoard and in the trackers, from a line of
metrics.jsonl. The groups are numbered so that the important ones come first. None: a number that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

GIB = 1 << 30
Scalars = Iterator[tuple[str, float | None]]


def scalars(record: Mapping[str, Any]) -> Scalars:
    """``record``: of ``metrics.to_json``."""
    for name, value in record["losses"].items():
        auxiliary = name.removeprefix("aux/")
        yield (f"1_loss/{name}" if auxiliary == name else f"4_auxiliary_loss/{auxiliary}"), value
    for name, value in record.get("balance", {}).items():
        yield f"1_balance/{name}", value
    yield from _routing_scalars(record["routing"])
    yield from held_out_scalars(record.get("held_out"))
    for name, count in record["counts"].items():
        yield f"1_loss_counts/{name}", float(count)
    yield "3_optimizer/learning_rate", record["learning_rate"]
    yield "3_optimizer/grad_norm", record["grad_norm"]
    yield from _speed_scalars(record)


def held_out_scalars(found: Mapping[str, Any] | None) -> Scalars:
    """Of the ``held_out`` of a record."""
    if found is not None:
        for name, value in {**found["losses"], **found["scores"]}.items():
            yield f"0_held_out/{name}", value


def _routing_scalars(layers: Sequence[Mapping[str, Any]]) -> Scalars:
    if not layers:
        return
    load = [share for layer in layers for share in layer["load_over_even"]]
    yield "2_routing/load_over_even_min", min(load)
    yield "2_routing/load_over_even_max", max(load)
    yield "2_routing/dead_experts", float(load.count(0))
    for name in ("entropy", "marginal_entropy", "dropped"):
        for modality in layers[0][name]:
            yield f"2_routing/{name}/{modality}", _mean(layer[name][modality] for layer in layers)
    for layer in layers:
        prefix, load = f"6_layers/{layer['layer']:02d}", layer["load_over_even"]
        yield f"{prefix}/load_over_even_min", min(load)
        yield f"{prefix}/load_over_even_max", max(load)
        yield f"{prefix}/dead_experts", float(load.count(0))
        for name, value in layer.get("lending", {}).items():
            yield f"{prefix}/lending/{name}", value
        for combination, its in layer.get("combinations", {}).items():
            yield f"{prefix}/to_its_expert/{combination}", its["to_its_expert"]
        for name in ("entropy", "marginal_entropy"):
            for modality, value in layer[name].items():
                yield f"{prefix}/{name}/{modality}", value


def _speed_scalars(record: Mapping[str, Any]) -> Scalars:
    yield "5_speed/tokens_per_second", record["tokens_per_second"]
    if (flops := record.get("flops_per_second")) is not None:
        yield "5_speed/tflops_per_second", flops / 1e12
    if (mfu := record.get("mfu")) is not None:
        yield "5_speed/mfu", mfu
    if (planned := record.get("planned")) is not None:
        yield "5_speed/tokens_per_second_planned", planned["tokens_per_second"]
        yield "5_speed/peak_memory_gib/planned", planned["peak_memory"] / GIB
    yield "5_speed/data_wait_fraction", record["data_stall"]
    yield "5_speed/tokens_total", float(record["tokens_total"])
    for kind, size in record["peak_memory"].items():
        yield f"5_speed/peak_memory_gib/{kind}", size / GIB
    yield "5_speed/bad_samples", float(record["bad_samples"])
    yield "5_speed/cut_samples", float(sum(record["cut"].values()))


def _mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is."""
    known = list(values)
    return None if None in known else fmean(value for value in known if value is not None)
