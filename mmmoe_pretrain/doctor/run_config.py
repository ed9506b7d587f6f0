"""The config on every host: the same, of a layout that works on so many ranks, and with data that can be read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Problem, Reports, Verdict, mismatch, names
from mmmoe_pretrain.urls import is_url


def layout(peer: Peer) -> dict[str, str]:
    """Reads the config."""
    from mmmoe_pretrain.parallel.layout import resolve_layout

    assert peer.subject.config is not None
    try:
        config = run_config.load(peer.subject.config, tuple(peer.subject.overrides))
        peer.config = config
        found = resolve_layout(config, peer.world)
    except ValueError as error:
        return {"problem": str(error).partition("\n")[0], "digest": "", "layout": ""}
    values = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    degrees = f"data {found.data} x tensor {found.tensor} x pipeline {found.pipeline}, expert {found.expert}"
    return {
        "problem": "",
        "digest": hashlib.sha256(values.encode()).hexdigest()[:8],
        "layout": f"{degrees}, {found.engine}, on {peer.world} rank{'s' * (peer.world > 1)}",
    }


def judge_layout(reports: Reports) -> Verdict:
    wrong = {host: its["problem"] for host, its in reports.items() if its["problem"]}
    if wrong:
        same = len(reports) == len(wrong) and len(set(wrong.values())) == 1
        told = next(iter(wrong.values())) if same else names(f"{host}: {text}" for host, text in wrong.items())
        return Verdict("", [Problem("FAILED", told, "change the config, or the number of ranks")])
    told = mismatch("the config (its digest)", {host: its["digest"] for host, its in reports.items()})
    problems = [Problem("FAILED", told, "give every host the same file and overrides")] if told else []
    return Verdict(next(iter(reports.values()))["layout"], problems)


def data(peer: Peer) -> dict[str, Any]:
    """The paths of ``data`` that this host cannot read; servers are not asked."""
    from mmmoe_pretrain.data.sources.listing import is_absent

    paths = [source.path for source in peer.read_config.data.train]
    missing = [f"data.train {_where(path)} is not there" for path in paths if is_absent(path)]
    files = [("data.train", path) for path in paths if Path(path).exists()]
    if tokenizer := peer.read_config.data.tokenizer:
        files.append(("data.tokenizer", tokenizer))
    files += [(f"{place}.{its.file_setting}", its.file) for place, its in peer.read_config.files.items()]
    for key, path in files:
        if not Path(path).exists():
            missing.append(f"{key} {_where(path)} is not there")
        elif not os.access(path, os.R_OK):
            missing.append(f"{key} {_where(path)} cannot be read")
    return {"count": len(paths), "missing": missing[:20]}


def _where(path: str) -> str:
    relative = "" if Path(path).is_absolute() or is_url(path) else f" (in {os.getcwd()})"
    return f"{path[:200]}{relative}"


def judge_data(reports: Reports) -> Verdict:
    found = [f"{host}: {names(its['missing'])}" for host, its in reports.items() if its["missing"]]
    remedy = "mount or copy the data there, change its mode, or correct data.train and data.tokenizer"
    count = next(iter(reports.values()))["count"]
    seen = f"{count} source{'s' * (count > 1)} of data.train, readable on every host"
    return Verdict(seen, [Problem("FAILED", "; ".join(found[:8]), remedy)] if found else [])
