"""Disks that are full or read-only, services that cannot rename: earlier checkpoints are kept, and all ranks raise
the error."""

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

import fsspec
import pytest
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from mmmoe_pretrain.checkpoint import save_plan, storage, store
from mmmoe_pretrain.checkpoint.storage import LocalStorage, StorageError, UrlStorage, open_storage
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import assert_same, small_state
from tests.distributed import run_ranks

KEEP = store.Retention(last=2)


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
    first = store.save(small_disk, 1, small_state(), {}, None, KEEP)
    (small_disk / "other").write_bytes(b"x" * ((1 << 20) - 28_000))
    with pytest.raises(StorageError, match=r"step_00000002\.tmp/.*the disk is full \([\d,]+ bytes free\).*keep_last"):
        store.save(small_disk, 2, small_state(), {"much": "x" * 20_000}, None, KEEP)
    assert names(small_disk) == ["latest", "other", "step_00000001"]
    store.verify(first)
    (small_disk / "other").unlink()
    assert store.save(small_disk, 2, small_state(), {}, None, KEEP) == store.find_latest(small_disk)


def test_a_disk_mounted_read_only_is_named(small_disk: Path) -> None:
    first = store.save(small_disk, 1, small_state(), {}, None, KEEP)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"step_00000002\.tmp.*the file system is read-only; .*checkpoint\.folder"):
        store.save(small_disk, 2, small_state(), {}, None, KEEP)
    assert store.find_latest(small_disk) == first
    store.verify(first)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser has every right")
def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="no permission"):
        store.save(tmp_path, 1, small_state(), {}, None, KEEP)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_every_cause_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", raising(number))
    with pytest.raises(StorageError, match=r"cannot write .*rank_00000\.safetensors: .*set checkpoint\.folder"):
        store.save(tmp_path, 1, small_state(), {}, None, KEEP)
    assert names(tmp_path) == []


def raising(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("no folder")
    with pytest.raises(StorageError, match=r"cannot make the folder .*root/step_00000001.*a file is where a folder"):
        store.save(tmp_path / "root", 1, small_state(), {}, None, KEEP)


def test_a_folder_that_is_not_shared_by_all_nodes_is_named(tmp_path: Path) -> None:
    local = LocalStorage(str(tmp_path))
    plan = save_plan.plan_save(small_state(), None)
    draft = save_plan.begin(local, 1, {}, None)
    record = save_plan.write_rank_file(local, draft, plan, plan.views(small_state()))
    elsewhere = save_plan.FileRecord("rank_00001.safetensors", 80, "0" * 32)
    with pytest.raises(StorageError, match=r"rank_00001\.safetensors .* no such file; .* all nodes share"):
        save_plan.commit(local, draft, 1, plan, [record, elsewhere], {})


def test_one_rank_that_fails_fails_the_save_on_all_and_the_next_works(tmp_path: Path) -> None:
    def ranks(root: str) -> list[str]:
        said = []
        fsspec.register_implementation("norename", NoRename, clobber=True)
        with process_group(timeout_minutes=0.5):
            group, rank = dist.group.WORLD, dist.get_rank()
            state = small_state(rank, 2)
            store.save(root, 1, state, {}, group, KEEP)
            write = save_plan.write_rank_file
            for failure in (OSError(errno.ENOSPC, "full"), ValueError("bad"), KeyError("defect")):
                save_plan.write_rank_file = (lambda *_, e=failure: throw(e)) if rank == 1 else write
                try:
                    store.save(root, 2, state, {}, group, KEEP)
                except (ValueError, RuntimeError) as error:
                    said.append(f"{type(error).__name__}: {error}")
                save_plan.write_rank_file = write
                latest = store.find_latest(root)
                assert latest is not None and latest.step == 1
                dist.barrier()
            again = store.save(root, 2, state, {}, group, KEEP)
            store.verify(again, group)
            assert_same(store.load(again, state, group), state)
        return said

    for root in (str(tmp_path / "local"), f"norename://{tmp_path}/url"):
        first, second = run_ranks(2, ranks, root)
        assert first == second
        assert [text.partition(":")[0] for text in first] == ["StorageError", "ValueError", "RuntimeError"]
        assert "rank 1: KeyError: 'defect'" in first[2]
    for folder in ("local", "url"):
        assert names(tmp_path / folder) == ["latest", "step_00000001", "step_00000002"]


def throw(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("scheme", ["memory://runs/{}", "norename://{}", "file://{}", "{}"])
def test_every_kind_of_place_saves_finds_loads_and_deletes(tmp_path: Path, scheme: str) -> None:
    root = scheme.format(tmp_path)
    assert store.find_latest(root) is None and store.checkpoints(root) == []
    for step in (1, 2, 3, 3):
        checkpoint = store.save(root, step, small_state(add=step), {"seed": 7}, None, KEEP)
    assert [c.step for c in store.checkpoints(root)] == [2, 3]
    assert store.find_latest(root) == checkpoint
    store.verify(checkpoint)
    assert store.read_meta(checkpoint) == {"seed": 7, "step": 3}
    assert_same(store.load(checkpoint, small_state(), None), small_state(add=3))
    again = store.write_state(f"{root}/other", 5, store.read_state(checkpoint), {})
    assert store.read_state(again).keys() == small_state().keys()
    store.rewind(store.checkpoints(root)[0])
    assert [c.step for c in store.checkpoints(root)] == [2]
    fsspec.filesystem("memory").store.clear()


def test_on_a_url_the_manifest_commits_and_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"norename://{tmp_path}"
    writes, original = [], UrlStorage.write

    def write(self: UrlStorage, path: str, chunks: Any) -> int:
        writes.append(path)
        return original(self, path, chunks)

    monkeypatch.setattr(UrlStorage, "write", write)
    checkpoint = store.save(root, 1, small_state(), {}, None, KEEP)
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


def test_a_local_deletion_killed_in_the_middle_leaves_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(tmp_path, 1, small_state(), {}, None, KEEP)
    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
        open_storage(tmp_path).remove_folder("step_00000001")
    assert names(tmp_path) == ["latest", "step_00000001.gone.tmp"]
    assert store.find_latest(tmp_path) is None


def test_a_rename_that_fails_brings_the_replaced_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.save(tmp_path, 1, small_state(add=1), {}, None, KEEP)
    monkeypatch.setattr(storage, "_swap", lambda *_: False)  # as on a network file system
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", raising(errno.EIO))
        with pytest.raises(StorageError):
            store.save(tmp_path, 1, small_state(add=2), {}, None, KEEP)
    assert_same(store.load(first, small_state(), None), small_state(add=1))
    store.save(tmp_path, 1, small_state(add=2), {}, None, KEEP)
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
        only = store.save(root, 1, small_state(add=1), {}, None, KEEP)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", kill)
            with pytest.raises(KeyboardInterrupt):
                store.save(root, 1, small_state(add=2), {}, None, KEEP)
        assert names(root) == ["latest", "step_00000001.old.tmp", "step_00000001.tmp"]
        use(root)
        assert store.candidates(root) == [only]
        store.verify(only)
        assert_same(store.load(only, small_state(), None), small_state(add=1))
        store.save(root, 1, small_state(add=3), {}, None, KEEP)
        assert_same(store.load(only, small_state(), None), small_state(add=3))
        assert names(root) == ["latest", "step_00000001"]


def test_what_was_being_deleted_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        store.save(tmp_path, step, small_state(), {}, None, KEEP)
    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
        open_storage(tmp_path).remove_folder("step_00000002")
    assert [c.step for c in store.candidates(tmp_path)] == [1]
    assert store.clean(tmp_path) == ["step_00000002.gone.tmp"]


@pytest.mark.parametrize("scheme", ["{}", "norename://{}"])
def test_a_checkpoint_that_latest_does_not_name_yet_waits_to_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    root = scheme.format(tmp_path)
    first = store.save(root, 1, small_state(add=1), {}, None, KEEP)
    with monkeypatch.context() as patched:
        patched.setattr(save_plan, "point_to", kill)
        with pytest.raises(KeyboardInterrupt):
            store.save(root, 2, small_state(add=2), {}, None, KEEP)
    assert [c.step for c in store.checkpoints(root)] == [1, 2]
    assert store.candidates(root) == [first] and store.find_latest(root) == first
    for where in ("write_rank_file", "commit", "point_to"):  # and killed again
        with monkeypatch.context() as patched:
            patched.setattr(save_plan, where, kill)
            with pytest.raises(KeyboardInterrupt):
                store.save(root, 2, small_state(add=3), {}, None, KEEP)
        assert store.candidates(root) == [first]
    second = store.save(root, 2, small_state(add=4), {}, None, KEEP)
    assert store.candidates(root) == [first, second]
    assert_same(store.load(second, small_state(), None), small_state(add=4))
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_going_back_deletes_the_newest_first_and_none_of_them_counts_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [store.save(tmp_path, step, small_state(), {}, None, store.Retention(last=9)) for step in range(1, 6)]
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


def test_a_peer_that_dies_behind_the_commit_takes_nothing_with_it(
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


def test_a_service_that_fails_is_no_missing_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"norename://{tmp_path}"
    store.save(root, 1, small_state(), {}, None, KEEP)
    monkeypatch.setattr(NoRename, "cat_file", raising(errno.ETIMEDOUT))
    with pytest.raises(StorageError, match="credentials, the network"):
        store.find_latest(root)


def save_forever(root: str, steps: int) -> None:
    """Ever the same steps, so that saves replace, point and delete."""
    for turn in range(1, 10_000):
        store.save(root, turn % steps, small_state(add=turn), {"turn": turn}, None, store.Retention(last=1))


@pytest.mark.parametrize(("scheme", "steps"), [("{}", 3), ("{}", 1), ("norename://{}", 3)])
def test_killed_at_any_moment_what_is_found_is_whole(tmp_path: Path, scheme: str, steps: int) -> None:
    root, rng = scheme.format(tmp_path / "root"), random.Random(3)
    context, turns = multiprocessing.get_context("fork"), []
    for _ in range(12):
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
    assert len(turns) > 6 and max(turns) > 3
