"""Disks that are full or read-only, services that cannot rename, kills: earlier checkpoints are kept."""

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from mmmoe_pretrain.checkpoint import save_plan, storage, store
from mmmoe_pretrain.checkpoint.storage import LocalStorage, StorageError, UrlStorage, open_storage
from tests.checkpoint.support import assert_same, save, small_state


class NoRename(LocalFileSystem):
    """What an object store offers, on files that several processes see."""

    protocol = "norename"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("norename://"))

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("an object store cannot rename")

    mv_file = rename = move = mv


@pytest.fixture(autouse=True)
def protocol() -> None:
    fsspec.register_implementation("norename", NoRename, clobber=True)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this user may not mount a file system")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(small_disk: Path) -> None:
    first = save(small_disk, 1)
    (small_disk / "other").write_bytes(b"x" * ((1 << 20) - 28_000))
    with pytest.raises(StorageError, match=r"step_00000002\.tmp/.*the disk is full \([\d,]+ bytes free\).*keep_last"):
        save(small_disk, 2, meta={"much": "x" * 20_000})
    assert names(small_disk) == ["latest", "other", "step_00000001"]
    store.verify(first)
    (small_disk / "other").unlink()
    assert save(small_disk, 2) == store.find_latest(small_disk)


def test_a_disk_mounted_read_only_is_named(small_disk: Path) -> None:
    first = save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"step_00000002\.tmp.*the file system is read-only; .*checkpoint\.folder"):
        save(small_disk, 2)
    assert store.find_latest(small_disk) == first
    store.verify(first)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_every_disk_error_names_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", raising(number))
    with pytest.raises(StorageError, match=r"cannot write .*rank_00000\.safetensors: .*set checkpoint\.folder"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def raising(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("no folder")
    with pytest.raises(StorageError, match=r"cannot make the folder .*root/step_00000001.*a file is where a folder"):
        save(tmp_path / "root", 1)


def test_a_folder_that_is_not_shared_by_all_nodes_is_named(tmp_path: Path) -> None:
    local = LocalStorage(str(tmp_path))
    plan = save_plan.plan_save(small_state(), None)
    draft = local.draft("step_00000001")
    local.make_folder(draft)
    record = save_plan.write_tensors(local, draft, plan.file, plan.entries, plan.views(small_state()))
    elsewhere = save_plan.FileRecord("rank_00001.safetensors", 80, "0" * 32)
    with pytest.raises(StorageError, match=r"rank_00001\.safetensors .* no such file; .* all nodes share"):
        save_plan.commit(local, draft, 1, plan, [record, elsewhere], {})


@pytest.mark.parametrize("scheme", ["memory://runs/{}", "norename://{}", "file://{}", "{}"])
def test_every_kind_of_place_saves_finds_loads_and_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    root = scheme.format(tmp_path)
    assert store.find_latest(root) is None and store.checkpoints(root) == []
    for step, add in ((1, 1), (2, 2), (3, 9), (3, 3)):  # the last save of a step counts
        checkpoint = save(root, step, small_state(add=add), {"seed": add}, keep=store.Retention(last=2))
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="full"):
        patched.setattr(save_plan, "write_tensors", mock.Mock(side_effect=StorageError("full")))
        save(root, 4)
    assert open_storage(root).folders() == ["step_00000002", "step_00000003"]
    assert [c.step for c in store.checkpoints(root)] == [2, 3]
    assert store.find_latest(root) == checkpoint
    store.verify(checkpoint)
    assert store.read_meta(checkpoint) == {"seed": 3, "step": 3}
    assert_same(store.load(checkpoint, small_state(), None), small_state(add=3))
    again = store.write_state(f"{root}/other", 5, store.read_state(checkpoint), {})
    assert store.read_state(again).keys() == small_state().keys()
    store.rewind(store.checkpoints(root)[0])
    assert [c.step for c in store.checkpoints(root)] == [2] and store.find_latest(root) == store.checkpoints(root)[0]
    fsspec.filesystem("memory").store.clear()


def test_on_a_url_the_manifest_commits_and_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"norename://{tmp_path}"
    writes, original = [], UrlStorage.write

    def write(self: UrlStorage, path: str, chunks: Any) -> int:
        writes.append(path)
        return original(self, path, chunks)

    monkeypatch.setattr(UrlStorage, "write", write)
    checkpoint = save(root, 1)
    assert writes[-1] == "step_00000001/manifest.json"
    monkeypatch.setattr(NoRename, "rm", raising(errno.EIO))
    with pytest.raises(StorageError, match=r"cannot delete norename://.*step_00000001: OSError"):
        open_storage(root).remove_folder("step_00000001")  # killed in the middle
    assert (tmp_path / "step_00000001" / "index.json").is_file()
    assert store.find_latest(root) is None
    with pytest.raises(ValueError, match="no manifest"):
        store.verify(checkpoint)
    monkeypatch.undo()
    assert store.clean(root) == ["step_00000001"]


def test_a_rename_that_fails_brings_the_replaced_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1, small_state(add=1))
    monkeypatch.setattr(storage, "_swap", lambda *_: False)  # as on a network file system
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", raising(errno.EIO))
        with pytest.raises(StorageError):
            save(tmp_path, 1, small_state(add=2))
    assert_same(store.load(first, small_state(), None), small_state(add=1))
    save(tmp_path, 1, small_state(add=2))
    assert_same(store.load(first, small_state(), None), small_state(add=2))
    assert names(tmp_path) == ["latest", "step_00000001"]


def kill(*_: Any) -> None:
    raise KeyboardInterrupt("killed here: nothing is tidied up")


def test_a_kill_between_the_old_and_the_new_one_of_a_step_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_swap", lambda *_: False)  # as on a network file system
    for use in (store.candidates, store.clean):
        root = tmp_path / use.__name__
        only = save(root, 1, small_state(add=1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", kill)
            with pytest.raises(KeyboardInterrupt):
                save(root, 1, small_state(add=2))
        assert names(root) == ["latest", "step_00000001.old.tmp", "step_00000001.tmp"]
        use(root)
        assert store.candidates(root) == [only]
        store.verify(only)
        assert_same(store.load(only, small_state(), None), small_state(add=1))
        save(root, 1, small_state(add=3))
        assert_same(store.load(only, small_state(), None), small_state(add=3))
        assert names(root) == ["latest", "step_00000001"]


def test_a_checkpoint_whose_deletion_was_killed_is_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
        open_storage(tmp_path).remove_folder("step_00000002")
    assert [c.step for c in store.candidates(tmp_path)] == [1] and store.find_latest(tmp_path).step == 1
    assert store.clean(tmp_path) == ["step_00000002.gone.tmp"]


@pytest.mark.parametrize("scheme", ["{}", "norename://{}"])
def test_a_checkpoint_that_latest_does_not_name_yet_waits_to_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    root = scheme.format(tmp_path)
    first = save(root, 1, small_state(add=1))
    with monkeypatch.context() as patched:
        patched.setattr(save_plan, "point_to", kill)
        with pytest.raises(KeyboardInterrupt):
            save(root, 2, small_state(add=2))
    assert [c.step for c in store.checkpoints(root)] == [1, 2]
    assert store.candidates(root) == [first] and store.find_latest(root) == first
    for where in ("write_tensors", "commit", "point_to"):  # and killed again
        with monkeypatch.context() as patched:
            patched.setattr(save_plan, where, kill)
            with pytest.raises(KeyboardInterrupt):
                save(root, 2, small_state(add=3))
        assert store.candidates(root) == [first]
    second = save(root, 2, small_state(add=4))
    assert store.candidates(root) == [first, second]
    assert_same(store.load(second, small_state(), None), small_state(add=4))
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_a_killed_rollback_leaves_no_later_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [save(tmp_path, step, keep=store.Retention(last=9)) for step in range(1, 6)]
    remove, deleted = LocalStorage.remove_folder, []

    def until_killed(self: LocalStorage, name: str) -> None:
        if len(deleted) == 2:
            kill()
        deleted.append(name)
        remove(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "remove_folder", until_killed)
        with pytest.raises(KeyboardInterrupt):
            store.rewind(saved[1])
    assert deleted == ["step_00000005", "step_00000004"]
    assert store.candidates(tmp_path) == saved[:2]
    (tmp_path / "step_00000002" / "index.json").unlink()  # by hand, as an error advises
    assert store.candidates(tmp_path) == saved[:1]


def test_a_peer_that_dies_after_the_commit_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = save_plan.exchange

    def rank_has_ended(*args: Any) -> None:
        exchange(*args)
        raise RuntimeError("connection closed by peer")

    for root in (str(tmp_path / "local"), f"norename://{tmp_path}/url"):
        plan = save_plan.plan_save(small_state(), None)
        with monkeypatch.context() as patched:
            patched.setattr(save_plan, "exchange", rank_has_ended)
            with pytest.raises(RuntimeError, match="by peer"):
                save_plan.write_checkpoint(open_storage(root), 1, plan, plan.views(small_state()), {}, None)
        (found,) = store.candidates(root)
        store.verify(found)


def test_unknown_protocols_and_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nosuch://b cannot be opened: Protocol not known: nosuch; .*memory"):
        store.find_latest("nosuch://b")
    monkeypatch.setitem(known_implementations, "lacking",
                        {"class": "no_such_package.FS", "err": "Install no_such_package"})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"lacking://b .*Install no_such_package; install that package on every node"
    ):
        store.find_latest("lacking://b")


def test_a_failing_service_is_not_taken_for_a_missing_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"norename://{tmp_path}"
    save(root, 1)
    monkeypatch.setattr(NoRename, "cat_file", raising(errno.ETIMEDOUT))
    with pytest.raises(StorageError, match="credentials, the network"):
        store.find_latest(root)


def save_forever(root: str, steps: int) -> None:
    """Ever the same steps, so that saves replace, point and delete."""
    for turn in range(1, 10_000):
        save(root, turn % steps, small_state(add=turn), {"turn": turn}, keep=store.Retention(last=1))


@pytest.mark.parametrize(("scheme", "steps"), [("{}", 1), ("norename://{}", 3)])
def test_after_a_kill_at_any_moment_the_latest_is_intact(tmp_path: Path, scheme: str, steps: int) -> None:
    root, rng = scheme.format(tmp_path / "root"), random.Random(3)
    context, turns = multiprocessing.get_context("fork"), []
    while len(turns) < 9 or max(turns) < 4:  # on a busy machine a kill may come before the first save is done
        writer = context.Process(target=save_forever, args=(root, steps))
        writer.start()
        time.sleep(rng.uniform(0.05, 0.25))
        writer.kill()
        writer.join()
        found = store.find_latest(root)
        if found is None:  # at a URL, a step that is written again is missing until it is complete
            assert not turns or scheme != "{}"
            continue
        store.verify(found)
        turns.append(store.read_meta(found)["turn"])
        assert_same(store.load(found, small_state(), None), small_state(add=turns[-1]))
