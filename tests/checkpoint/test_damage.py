"""Damaged and hostile checkpoints: never taken for whole, and refused with an error that names the file."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint import index, store
from mmmoe_pretrain.checkpoint.state import ShardedTensor, model_key
from mmmoe_pretrain.checkpoint.storage import LocalStorage
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import as_version_1, assert_same, rewrite, save, small_state
from tests.distributed import run_ranks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints; tests damage the second."""
    for step in (1, 2):
        save(tmp_path, step, small_state(add=step), {"seed": 7})
    return tmp_path


def newest(root: Path) -> store.Checkpoint:
    found = store.find_latest(root)
    assert found is not None
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "index.json", "boxes.bin", "meta.json"])
def test_one_flipped_bit_is_found(root: Path, name: str) -> None:
    store.verify(newest(root))
    flip(root / "step_00000002" / name, -3)
    with pytest.raises(ValueError, match=rf"step_00000002 is damaged: {name} \(1 files in all\)"):
        store.verify(newest(root))


def truncate(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


TEARS: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "a file is missing": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "truncated manifest": lambda folder: (folder / "manifest.json").write_bytes(
        (folder / "manifest.json").read_bytes()[:-9]
    ),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest of another step": lambda folder: shutil.copy(folder.parent / "step_00000001" / "manifest.json", folder),
    "deep manifest": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000),
    "a pipe where the manifest was": lambda folder: (
        (folder / "manifest.json").unlink(),
        os.mkfifo(folder / "manifest.json"),
    ),
    "folder gone": shutil.rmtree,
    "a file where the folder was": lambda folder: (shutil.rmtree(folder), folder.write_text("?")),
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_an_incomplete_checkpoint_is_skipped_and_refused(
    root: Path, tear: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    truncated = newest(root)
    tear(root / "step_00000002")
    assert newest(root).step == 1
    assert [c.step for c in store.checkpoints(root)] == [1]
    assert "'step_00000002', which is not complete; the newest complete one is step_00000001" in caplog.text
    for use in (store.verify, store.read_state):
        with pytest.raises(ValueError, match="step_00000002"):
            use(truncated)


@pytest.mark.parametrize(
    "pointer", [None, b"", b"step_0000", b"step_00000099\n", b"../other\n", b"\xff\xfe", b"x" * 5000]
)
def test_without_a_valid_latest_file_the_newest_folder_is_found(root: Path, pointer: bytes | None) -> None:
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_bytes(pointer)
    assert newest(root).step == 2


def test_leftovers_of_killed_writers_are_ignored_and_removed_by_the_next_save(root: Path) -> None:
    for name in ("step_00000003.tmp", "step_00000002.old.tmp", "step_00000001.gone.tmp", "step_00000004"):
        shutil.copytree(root / "step_00000002", root / name)
    (root / "step_00000004" / "manifest.json").unlink()
    for foreign in ("step_00000005", "step_00000006.tmp", "notes"):
        (root / foreign).mkdir()
        (root / foreign / "mine.txt").write_text("keep")
    assert newest(root).step == 2
    assert [c.step for c in store.checkpoints(root)] == [1, 2]
    save(root, 3)
    assert sorted(p.name for p in root.iterdir()) == [
        "latest", "notes", "step_00000001", "step_00000002", "step_00000003", "step_00000005", "step_00000006.tmp",
    ]  # fmt: skip


def set_at(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Put the last of ``path`` at the place that the others name."""

    def change(value: Any) -> None:
        for key in path[:-2]:
            value = value[key]
        value[path[-2]] = path[-1]

    return change


ROWS = ("tensors", "model/rows")
HUGE = 1 << 50
INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no tensors": (lambda index: index.pop("tensors"), "tensors as None, not an object"),
    "files no list": (set_at("files", {}), "files as {}, not a list"),
    "another file": (set_at("files", ["../../etc/passwd"]), "which manifest.json does not list"),
    "file not of the manifest": (set_at("files", ["rank_00009.safetensors"]), "which manifest.json does not list"),
    "a name no parameter has": (set_at("tensors", "a\ud800" * 5000, {}), "a tensor named"),
    "file number": (set_at(*ROWS, "boxes", 0, 0, 3), "file 3 of model/rows; it names 1 files"),
    "negative place": (set_at(*ROWS, "boxes", 0, 1, -8), "place of model/rows as -8"),
    "place beyond": (set_at(*ROWS, "boxes", 0, 1, HUGE), "192 bytes of model/rows at 1,125,899,906,842,624 in rank"),
    "a float": (set_at(*ROWS, "boxes", 0, 1, 8.0), "place of model/rows as 8.0"),
    "a bool": (set_at(*ROWS, "shape", [True, 6]), "shape of model/rows as True"),
    "dtype": (set_at(*ROWS, "dtype", "C64"), "dtype of model/rows as 'C64'"),
    "dtype no text": (set_at(*ROWS, "dtype", [1]), "dtype of model/rows as"),
    "huge shape": (set_at(*ROWS, "shape", [HUGE, HUGE]), "too large"),
    "huge and empty": (set_at(*ROWS, {"shape": [0, HUGE, HUGE], "dtype": "F32", "boxes": []}), "too large"),
    "many dimensions": (set_at(*ROWS, {"shape": [1] * 40, "dtype": "F32", "boxes": []}), "too large"),
    "huge box": (set_at(*ROWS, {"shape": [HUGE], "dtype": "U8", "boxes": [[0, 0, [0], [HUGE]]]}),
                 "bytes of tensors in files of"),
    "box outside": (set_at(*ROWS, "boxes", 0, 2, [1, 0]), r"a box \[8, 6\] at \[1, 0\] of model/rows"),
    "box of another rank": (set_at(*ROWS, "boxes", 0, 2, [0]), "a box"),
    "half a box": (set_at(*ROWS, "boxes", 0, 3, [4, 6]), "holds 24 of the 48 numbers of model/rows"),
    "no box": (set_at(*ROWS, "boxes", []), "holds 0 of the 48 numbers of model/rows"),
    "a box twice": (lambda index: index["tensors"]["model/bias"]["boxes"].append([0, 600, [0], [5]]),
                    "holds 10 of the 5 numbers, some twice, of model/bias"),
    "shared bytes": (set_at(*ROWS, {"shape": [1000, 48], "dtype": "F32",
                                    "boxes": [[0, 0, [i, 0], [1, 48]] for i in range(1000)]}), "bytes of tensors in"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), INDEXES.values(), ids=INDEXES.keys())
def test_an_index_of_version_1_that_no_save_wrote_is_refused(
    root: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    as_version_1(root / "step_00000002")
    refused_with(root, change, message)


def refused_with(root: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Change the index of the newest checkpoint; the hashes are right."""
    path = root / "step_00000002" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    rewrite(path, json.dumps(index).encode())
    store.verify(newest(root))
    with pytest.raises(ValueError, match=rf"step_00000002 is damaged.*{message}"):
        store.read_state(newest(root))
    if "bias" not in message:  # boxes of what is not asked for are not read
        with pytest.raises(ValueError, match=message):
            store.load_weights(newest(root), {"rows": torch.zeros(8, 6)})


COMMON = ("no tensors", "files no list", "another file", "file not of the manifest", "a name no parameter has",
          "a bool", "dtype", "dtype no text", "huge shape")  # fmt: skip
TABLES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {case: INDEXES[case] for case in COMMON} | {
    "boxes of version 1": (set_at(*ROWS, "boxes", [[0, 0, [0, 0], [8, 6]]]), "boxes of model/rows as .* not two"),
    "negative place": (set_at(*ROWS, "boxes", [-8, 1]), "boxes of model/rows as -8"),
    "place beyond": (set_at(*ROWS, "boxes", [HUGE, 1]), "1 boxes of model/rows at 1,125,899,906,842,624 in"),
    "too many boxes": (set_at(*ROWS, "boxes", [0, HUGE]), "1,125,899,906,842,624 boxes of model/rows at 0 in"),
    "blocks of few boxes": (set_at(*ROWS, "blocks", [[0, 48]]), "1 blocks of model/rows, which has 1 boxes"),
    "no box": (set_at(*ROWS, "boxes", [0, 0]), "holds 0 of the 48 numbers of model/rows"),
    "the boxes of another tensor": (lambda index: index["tensors"]["model/rows"].update(
        boxes=index["tensors"]["model/columns"]["boxes"]), r"a box \[6, 8\] at \[0, 0\] of model/rows"),
    "more bytes than there are": (set_at(*ROWS, "shape", [1000, 48]), "bytes of tensors in files of"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TABLES.values(), ids=TABLES.keys())
def test_an_index_that_no_save_wrote_is_refused(
    root: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    refused_with(root, change, message)


EDITS: dict[str, tuple[int, int, str]] = {  # the number of a row: file, place, offset (2), size (2)
    "file number": (0, 3, "file 3 of model/rows; it names 1 files"),
    "negative file": (0, -1, "file -1 of model/rows"),
    "negative place": (1, -8, "192 bytes of model/rows at -8 in rank_00000"),
    "place beyond": (1, HUGE, "192 bytes of model/rows at 1,125,899,906,842,624 in rank"),
    "box outside": (2, 1, r"a box \[8, 6\] at \[1, 0\] of model/rows"),
    "negative offset": (2, -1, r"a box \[8, 6\] at \[-1, 0\] of model/rows"),
    "an offset that wraps": (2, (1 << 63) - 1, r"a box \[8, 6\] at \[9223372036854775807, 0\] of model/rows"),
    "half a box": (4, 4, "holds 24 of the 48 numbers of model/rows"),
    "negative size": (4, -8, r"a box \[-8, 6\] at \[0, 0\] of model/rows"),
}  # fmt: skip


@pytest.mark.parametrize(("word", "value", "message"), EDITS.values(), ids=EDITS.keys())
def test_rows_of_boxes_that_no_save_wrote_are_refused(root: Path, word: int, value: int, message: str) -> None:
    folder = root / "step_00000002"
    at, _ = json.loads((folder / "index.json").read_text())["tensors"]["model/rows"]["boxes"]
    data = bytearray((folder / "boxes.bin").read_bytes())
    struct.pack_into("<q", data, at + 8 * word, value)
    rewrite(folder / "boxes.bin", bytes(data))
    refused_with(root, lambda index: None, message)


def test_metadata_of_another_step_or_no_json_is_refused(root: Path) -> None:
    path = root / "step_00000002" / "meta.json"
    for data in (b'{"step": 1}', b"{}", b'{"step": true}', b"[]", b"\xff", b"[" * 100_000, b'{"step": 2'):
        rewrite(path, data)
        with pytest.raises(ValueError, match=r"step_00000002 is damaged"):
            store.read_meta(newest(root))


def test_a_checkpoint_of_a_later_version_is_refused_and_not_deleted(root: Path) -> None:
    checkpoint = newest(root)
    path = root / "step_00000002" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(
        ValueError, match=r"version 3; this version of mmmoe reads 'mmmoe-checkpoint', versions 1 and 2"
    ):
        store.verify(checkpoint)
    store.clean(root)  # another program's work is not a leftover
    assert path.is_file()


@pytest.mark.parametrize(
    ("limit", "message"),
    [("MAX_INDEX", r"index\.json would have .* too many pieces; save from fewer ranks"),
     ("MAX_META", r"meta\.json would have .* make 'losses' smaller"),
     ("MAX_MANIFEST", r"manifest\.json would have .* 4 files are too many; save from fewer ranks")],
)  # fmt: skip
def test_no_checkpoint_is_committed_that_readers_would_refuse(
    root: Path, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    monkeypatch.setattr(index, limit, 150)
    with pytest.raises(ValueError, match=message):
        save(root, 3, meta={"seed": 7, "losses": "x" * 130})
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize(("name", "shape"), [("a b", (1,)), ("w" * 1000, (1,)), ("w", (1,) * 9)])
def test_no_tensor_is_saved_that_readers_would_refuse(root: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"names no tensor of a checkpoint|takes 8 dimensions"):
        save(root, 3, {model_key(name): ShardedTensor.whole(torch.zeros(shape))})
    assert newest(root).step == 2


def verify_and_load(root: Path) -> tuple[int, list[str]]:
    """How often this rank lists the folder to verify and load; then the error on each rank, case after case; the
    ranks must stay in step."""
    said, listed, sizes = [], [], LocalStorage.sizes
    with process_group(timeout_minutes=0.5):
        group, rank = dist.group.WORLD, dist.get_rank()
        checkpoint = save(root, 2, small_state(rank, 2), group=group)
        folder = root / checkpoint.name
        pristine = {path.name: path.read_bytes() for path in folder.iterdir()}
        with mock.patch.object(LocalStorage, "sizes", lambda *args: listed.append(args) or sizes(*args)):
            store.verify(checkpoint, group)
            assert_same(store.load(checkpoint, small_state(rank, 2), group), small_state(rank, 2))
        damages = [
            lambda: flip(folder / "rank_00001.safetensors", -1),
            (folder / "rank_00001.safetensors").unlink,
            lambda: rewrite(folder / "index.json", b"{}"),
        ]
        for damage in damages:
            dist.barrier()
            if rank == 0:
                damage()
            dist.barrier()
            for act in (lambda: store.verify(checkpoint, group),
                        lambda: store.load(checkpoint, small_state(rank, 2), group)):  # fmt: skip
                try:
                    act()
                    said.append("fine")
                except ValueError as error:
                    said.append(str(error).replace(str(root), "ROOT"))
            dist.barrier()
            if rank == 0:
                for name, data in pristine.items():
                    (folder / name).write_bytes(data)
        dist.barrier()
        store.verify(checkpoint, group)
    return len(listed), said


def test_damage_found_on_one_rank_is_reported_on_every_rank(tmp_path: Path) -> None:
    (listed, first), (listed_elsewhere, second) = run_ranks(2, verify_and_load, tmp_path)
    assert (listed, listed_elsewhere) == (2, 0)  # one rank alone looks at the sizes of all files
    assert first == second
    assert "ROOT/step_00000002 is damaged: rank_00001.safetensors (1 files in all)" in first[0]
    assert first[1] == "fine"  # sizes and places are right: only hashes see it
    assert "rank_00001.safetensors has no bytes of" in first[2] and first[2] == first[3]
    assert first[4] == "fine" and "files as None, not a list" in first[5]
