"""``make compare``: the demo's MoE model and its dense baseline, by one recipe, over several seeds.

Dense means one expert as wide as the K experts that a token visits together, so that a token costs the same FLOPs.
Each run trains on two ranks as the demo does, one after another. Writes ``docs/results.json`` (a column of ``mmmoe
evaluate --dense-results``) and ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.untrusted import brief, read_json

ROOT = Path(__file__).resolve().parents[1]
HEADLINE = ("image_to_text_r1", "image_to_text_r10", "text_to_image_r10", "speech_to_text_r1",
            "speech_to_text_r10", "text_to_speech_r10", "image_to_speech_r10", "speech_to_image_r10",
            "image_to_text_zero_shot", "image_to_text_zero_shot_balanced", "captions_perplexity")  # fmt: skip
MODELS = ("moe", "dense")


def dense_overrides(config: RunConfig) -> list[str]:
    """The dense model with as many active parameters a token as the MoE model."""
    width = config.moe.experts_per_token * config.moe.expert_hidden_size
    return ["moe.num_experts=1", "moe.experts_per_token=1", f"moe.expert_hidden_size={width}"]


def train_and_evaluate(path: Path, name: str, overrides: list[str], ranks: int) -> dict[str, Any]:
    """The report of one run; a run of this very config that is there already is finished and read."""
    config = run_config.load(path, [f"name={name}", *overrides])
    report, saved = config.run_dir / "report.json", config.run_dir / "config.yaml"
    if saved.is_file() and run_config.load(saved) != config:
        raise ValueError(f"{config.run_dir} was trained under another config than {path} gives now; remove it first")
    if not report.is_file():
        _call([str(ROOT / "launch" / "torchrun.sh"), str(ranks), "train", str(path), f"name={name}", *overrides])
        _call([sys.executable, "-m", "mmmoe_pretrain.cli", "evaluate", str(config.run_dir)])
    return read_report(report)


COLUMNS = {"metric": str, "value": int | float, "unit": str, "chance": int | float | None,
           "majority": int | float | None, "n": int}  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """The report of a run, with the columns that are compared. Raises ValueError where it lacks them."""
    report = read_json(path)
    rows = report.get("results")
    for row in rows if isinstance(rows, list) else [rows]:
        if not _is_row(row):
            raise ValueError(f"{path} is not a report (it has {brief(row)}); remove it to evaluate the run again")
    return report


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name, ...), kind) for name, kind in COLUMNS.items()):
        return False
    return all(math.isfinite(row[name] or 0) for name in ("value", "chance", "majority", "n"))


def _call(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    # As in the demo: sized for CPU cores, and run on them everywhere.
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def summarise(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and single values of each metric over the seeds."""
    rows = []
    for row in reports[0]["results"]:
        values = [r["value"] for report in reports for r in report["results"] if r["metric"] == row["metric"]]
        rows.append({"metric": row["metric"], "value": statistics.mean(values), "values": values,
                     "std": statistics.stdev(values) if len(values) > 1 else 0.0, "unit": row["unit"],
                     "chance": row["chance"], "majority": row["majority"], "n": row["n"]})  # fmt: skip
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The recorded comparison as a page."""
    lines = [
        "# The MoE model and a dense model of equal active FLOPs", "",
        f"Recorded {record['date']} by `make compare`: `{record['config']}`, {record['steps']} steps, seeds "
        f"{', '.join(map(str, record['seeds']))}, {record['ranks']} ranks.",
        "Both models have the same data and recipe. The dense one has one expert of the same active FLOPs. Scores",
        "are of the held-out rows of:", "", *(f"- {path}" for path in record["dense"]["test"]), "",
        "Values are the mean ± standard deviation over the seeds. Chance answers at random. Majority gives every",
        "query the best fixed answer (perplexity: token frequencies of the training targets). n: queries or tokens.",
        "",
        "| metric | chance | majority | dense | MoE | n |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    dense = {row["metric"]: row for row in record["dense"]["results"]}
    for row in record["moe"]["results"]:
        if row["metric"] in HEADLINE:
            other = dense[row["metric"]]
            cells = [_show(row["chance"], row), _show(row["majority"], row),
                     f"{_show(other['value'], row)} ± {_show(other['std'], row)}",
                     f"{_show(row['value'], row)} ± {_show(row['std'], row)}", f"{row['n']:,}"]  # fmt: skip
            lines.append(f"| {row['metric']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _show(value: float | None, row: dict[str, Any]) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if row["unit"] == "share" else f"{value:,.1f}"


def main() -> None:
    """Run what is missing, then write the two files; errors that a user can fix print one line."""
    try:
        compare()
    except ValueError as error:
        sys.exit(f"compare: {error}")


def compare() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    config = run_config.load(args.config)
    reports: dict[str, list[dict[str, Any]]] = {model: [] for model in MODELS}
    for seed in args.seeds:
        for model in MODELS:
            overrides = [f"seed={seed}", *(dense_overrides(config) if model == "dense" else [])]
            name = f"compare-{config.name}-{model}-seed{seed}"
            reports[model].append(train_and_evaluate(args.config, name, overrides, args.ranks))
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "config": str(args.config), "steps": config.train.steps,
        "seeds": args.seeds, "ranks": args.ranks,
        **{model: {"test": list(config.evaluate.test), "results": summarise(found)}
           for model, found in reports.items()},
    }  # fmt: skip
    args.out.mkdir(exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
