"""Small folders of everything that the project reads, and how it reads them.

``write_...`` makes a whole folder. The readers get the path of the damaged file in it; they return None where nothing
is wrong, or the outcome "skipped" with the reason.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import model_key, optimizer_key
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep import verify as data_verify
from mmmoe_pretrain.data_prep.inspect.measure import measure
from mmmoe_pretrain.data_prep.quality import dedup as quality_dedup
from mmmoe_pretrain.data_prep.quality.samples import Settings
from mmmoe_pretrain.data_prep.rows.inputs import open_input
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest
from mmmoe_pretrain.data_prep.rows.row import Fault, faults
from mmmoe_pretrain.data_prep.shards import shard as data_shard
from mmmoe_pretrain.data_prep.shards.encode import BadSample, EncodedSample, Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.shard_files import write_shard, write_shard_list
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.evaluate import report
from mmmoe_pretrain.evaluate.routing import history
from mmmoe_pretrain.evaluate.scores import Score
from mmmoe_pretrain.modalities import Modalities, Tokenizer
from mmmoe_pretrain.surgery.probe import logged_usage
from mmmoe_pretrain.train.journal import EVENTS, read_events
from mmmoe_pretrain.train.metrics import truncate_after
from mmmoe_pretrain.train.rollback import SKIPPED_BATCHES, read_skipped_batches
from mmmoe_pretrain.train.status import status_of
from mmmoe_pretrain.train.status_page import page
from tests.fuzz import inputs

STEP = 7
CHECKPOINT = f"step_{STEP:08d}"
Outcome = tuple[str, str]


def in_turn(path: Path, functions: Sequence[Callable[[Any], Any]]) -> Sequence[Callable[[Any], Any]]:
    """Begins with another one for each length of the file: a refusal ends a case."""
    first = path.stat().st_size % len(functions)
    return [*functions[first:], *functions[:first]]


def write_media(folder: Path) -> None:
    for suffix, files in {**inputs.images(), **inputs.clips()}.items():
        for i, content in enumerate(files if suffix not in ("gif", "bmp") else ()):
            (folder / f"file{i}.{suffix}").write_bytes(content)


def read_media(path: Path) -> Outcome | None:
    """``mmmoe-data shard`` of one row."""
    kind = "image" if path.suffix[1:] in inputs.images() else "audio"
    (path.parent / "manifest.jsonl").write_text(json.dumps({"key": "row", kind: path.name, "text": "a text"}) + "\n")
    (row,) = read_manifest(path.parent)
    size = 16 if path.stat().st_size % 2 else None
    made = Encoder(path.parent, MediaOptions(image_size=size, audio_rate=size and 8000))(row)
    return ("skipped", made.reason) if isinstance(made, BadSample) else None


def write_tars(folder: Path) -> None:
    """A folder with one shard for each dialect."""
    for i, content in enumerate(inputs.shards()):
        (folder / str(i)).mkdir()
        (folder / str(i) / "00000.tar").write_bytes(content)


def write_shards(folder: Path) -> None:
    """With its list and index, by ``mmmoe-data shard``'s own writer."""
    entries = []
    for number, (key, members) in enumerate(inputs.samples()):
        meta = {**json.loads(members.get("json", b"{}")), "key": key, "group": "", "split": "train"}
        members = {**members, "json": json.dumps(meta).encode()}
        entries.append(write_shard(folder / f"{number:05d}.tar", [EncodedSample(key, members)]))
    write_shard_list(folder, entries)
    open_indexed(folder)


def write_energon(folder: Path) -> None:
    """As ``energon prepare`` leaves it, of which Python is never imported."""
    write_shards(folder)
    for name in ("shards.json", "shards.index"):
        (folder / name).unlink()
    shards = sorted(path.name for path in folder.glob("*.tar"))
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": dict.fromkeys(shards, 1)}))
    parts = "".join(f"  - {name}\n" for name in shards)
    (folder / ".nv-meta/split.yaml").write_text(f"exclude: []\nsplit_parts:\n  train:\n{parts}  val: []\n")


def read_energon(path: Path) -> None:
    source = open_indexed(path.parent.parent)
    for i in range(len(source)):
        source.read(i)


def read_shards(folder: Path, modalities: Modalities) -> list[RawSample]:
    shards = open_indexed(folder, modalities=modalities)
    return [shards.read(i) for i in range(len(shards))]


def verify(path: Path) -> Outcome | None:
    """``mmmoe-data verify``: damage is a problem in a list, not an end."""
    problems = list(data_verify.verify_folder(path.parent, data_verify.Seen()))
    assert all(len(problem) < 4000 for problem in problems)
    return ("skipped", problems[0]) if problems else None


def inspect(path: Path) -> None:
    measure(path.parent)


def dedup(path: Path) -> None:
    """``mmmoe-data dedup --near --out``, which reshards."""
    options = quality_dedup.Options(settings=Settings(near=True), overwrite=True, workers=1)
    found = quality_dedup.dedup([str(path.parent)], options)
    quality_dedup.write_samples(found, path.parent / "out", True, options)


def write_manifest(folder: Path) -> None:
    row = {"image": "square.png", "audio": "tone.wav", "text": "A red square.", "split": "train", "language": "en"}
    parts = [{"text": "A red square."}, {"image": "square.png"}, {"audio": "tone.wav", "loss": False},
             {"file": "a.csv"}]  # fmt: skip
    rows = [{"key": "row-0", **row}, {"key": "row-1", **row}, {"key": "row-2", "parts": parts, "split": "train"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "square.png").write_bytes(inputs.images()["png"][0])
    (folder / "tone.wav").write_bytes(inputs.clips()["wav"][0])
    (folder / "a.csv").write_bytes(inputs.series()["csv"][0])


def read_manifest_of(path: Path) -> Outcome | None:
    """``mmmoe-data shard``."""
    measure(path.parent)
    options = ShardOptions(workers=1, max_bad_fraction=1.0)
    made = data_shard.shard_rows(read_manifest(path.parent), path.parent, path.parent / "out", options)
    return ("skipped", made.skipped[0].reason) if made.skipped else None


def write_zips(folder: Path) -> None:
    for i, content in enumerate(inputs.zips()):
        (folder / f"{i}.zip").write_bytes(content)


def write_tables(folder: Path) -> None:
    for name, content in inputs.tables().items():
        (folder / name).write_bytes(content)
    (folder / "0.png").write_bytes(inputs.images()["png"][0])
    (folder / "1.jpg").write_bytes(inputs.images()["jpeg"][0])


def write_sidecars(folder: Path) -> None:
    """Files in folders of classes, with texts and JSON beside them."""
    with zipfile.ZipFile(io.BytesIO(inputs.zips()[0])) as archive:
        archive.extractall(folder)


def read_input(path: Path) -> Outcome | None:
    """``mmmoe-data shard`` of a file, or of the folder of files that has ``changed`` as its name."""
    given = open_input(path.parents[1] if path.parent.name in ("red", "blue") else path)
    encoder, bad = Encoder(given.root, MediaOptions()), ""
    for found in given.rows:
        if isinstance(found, Fault):
            bad = bad or found.reason
            continue
        made = None if (problem := next(faults(found.row), None)) else encoder(found.row)
        bad = bad or problem or (made.reason if isinstance(made, BadSample) else "")
        assert len(bad) < 4000
    return ("skipped", bad) if bad else None


def write_config(folder: Path) -> None:
    (folder / "run.yaml").write_text(inputs.config_text(folder))


def read_config(path: Path, overrides: Sequence[str] = ()) -> None:
    """``mmmoe train`` up to its config."""
    dumped, again = path.with_name("dumped.yaml"), path.with_name("again.yaml")
    run_config.dump(run_config.load(path, list(overrides)), dumped)
    run_config.dump(run_config.load(dumped), again)
    assert dumped.read_text() == again.read_text()  # values may be NaN in parallel.deepspeed, so not config == config


def write_tokenizer(folder: Path) -> None:
    (folder / "tokens.model").write_bytes(inputs.tokenizer())


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for text in ("red number 1", "Ünïcode ﬁ ½ 한국어", "\0\1", "x" * 300, ""):
        ids = tokenizer.encode(text, np.random.default_rng(0), 0.5)
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        tokenizer.decode(ids)


ROW = {"metric": "m", "value": 0.5, "unit": "share", "chance": 0.1, "majority": None, "n": 10}
COUNTS = {"image": 8, "audio": 8, "text": 8}
LAYER = {
    "layer": 1,
    "load": {name: [0.5, 0.25, 0.25, 0.0] for name in COUNTS},
    "tokens": COUNTS,
    "assignments": COUNTS,
    "load_over_even": [2.0, 1.0, 1.0, 0.0],
}
# What a run writes for people and later commands to read: the values of each file, or of its lines.
LOGS: dict[str, Any] = {
    "metrics.jsonl": [
        {
            "step": step,
            "losses": {"total": 1.5},
            "tokens": 9,
            "seconds": 2.0,
            "data_seconds": 0.5,
            "tokens_total": 9,
            "peak_memory": {"resident": 9},
            "flops_per_second": 1e9,
            "mfu": 0.5,
            "bad_samples": 0,
            "routing": [LAYER],
        }
        for step in range(1, 5)
    ],
    EVENTS: [{"event": "saved", "step": step} for step in range(1, 5)],
    "report.json": {
        "run": "a",
        "step": 4,
        "date": "today",
        "test": ["a"],
        "results": [ROW, ROW],
        "routing": {},
        "notes": [],
    },
    SKIPPED_BATCHES: {"skipped_batches": [[3, 5], [9, 10]], "rollbacks": 1},
}


def write_logs(folder: Path) -> None:
    for name, values in LOGS.items():
        (folder / name).write_text("\n".join(map(json.dumps, values if isinstance(values, list) else [values])))


def read_log(path: Path) -> None:
    if path.name == "report.json":
        report.rows_of([Score("m", 0.5, 0.1, None, 10, (0.4, 0.6))], report.read(path))
    elif path.name == SKIPPED_BATCHES:
        cursor = read_skipped_batches(path.parent).cursor
        [cursor.batch(step) for step in (0, 3, 100)]
    elif path.name == EVENTS:
        read_events(path.parent)
        read_status(path)
    else:
        usage, truncate = (lambda path: logged_usage(path, 3, {1: 4})), (lambda path: truncate_after(path, 2))
        for read in in_turn(path, (history.read, usage, read_status, truncate)):
            read(path)


def read_status(path: Path) -> None:
    page(status_of(path.parent))


def weights() -> dict[str, torch.Tensor]:
    return {"mmmoe.a": torch.arange(12.0).view(3, 4), "mmmoe.b": torch.ones(5), "mmmoe.c": torch.zeros(2, 2, 2)}


def write_checkpoint(root: Path) -> None:
    """Of three parameters and their moments."""
    state = {}
    for name, w in weights().items():
        state |= {model_key(name): w, optimizer_key(name, "exp_avg"): w + 1, optimizer_key(name, "exp_avg_sq"): w + 2}
    store.write_state(root, STEP, state, {"vocab_size": 48, "version": 1})
    (root / "latest").write_text(CHECKPOINT + "\n")


def repair(folder: Path) -> None:
    """Make the manifest fit the files, so that damage gets past sizes and hashes."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_checkpoint(path: Path) -> Outcome | None:
    """Skipped where it does not count as a checkpoint any more."""
    root = path.parent if path.name == "latest" else path.parent.parent
    if path.name not in ("latest", "manifest.json") and path.stat().st_size % 10 < 7:
        repair(path.parent)
    checkpoint = store.Checkpoint(str(root), CHECKPOINT, STEP)
    found: list[store.Checkpoint | None] = []
    readers = (
        store.verify,
        store.read_meta,
        store.read_state,
        lambda checkpoint: store.load_weights(checkpoint, {k: torch.empty_like(w) for k, w in weights().items()}),
        lambda checkpoint: found.append(store.find_latest(root)),
    )
    for read in in_turn(path, readers):
        read(checkpoint)
    return None if found == [checkpoint] else ("skipped", "it is not a complete checkpoint")
