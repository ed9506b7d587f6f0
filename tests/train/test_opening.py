"""The ranks of a job open data.train: few ask for the shards, all read the same, and what cannot work is said."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.data import shared
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files, Stat
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.parallel.mesh import build_host_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train import opening
from tests.data.servers import http_server
from tests.data.test_loader import config_with
from tests.distributed import groups_of, run_ranks
from tests.support import tiny_config
from tests.train.faulty import config_in


def opened(root: Path, paths: Sequence[str], stat: Callable[[int, Files, str], Stat], log: Path) -> list[list[str]]:
    """Of each rank the keys of its first batch, where the machines have the shards at ``paths``, and ranks ask by
    ``stat``; ``log`` has a line for each list and stat while they open."""

    def rank() -> list[str]:
        number = int(os.environ["RANK"])
        config = config_with(root, {"train": [{"path": paths[number // 2]}], "level_tokens": "://" not in paths[0]})
        modalities = build_modalities(config.modalities, config.data.tokenizer)
        plain = Files.list, Files.stat

        def say(what: str, url: str) -> None:
            with log.open("a") as file:
                file.write(f"{number} {what} {url.rpartition('/')[2]}\n")

        def listed(files: Files, url: str) -> list[str]:
            say("lists", url)
            return plain[0](files, url)

        def asked(files: Files, url: str) -> Stat:
            say("asks", url)
            return stat(number, files, url)

        Files.list, Files.stat = listed, asked  # type: ignore[method-assign]
        socket.gethostname = lambda: f"machine {number // 2}"
        with process_group(1.0):
            host, groups = build_host_groups(1.0), groups_of(ParallelConfig(expert_parallel_size=1), 4)
            with opening.open_data(config, modalities, groups, host, None) as loader:
                Files.list, Files.stat = plain  # type: ignore[method-assign]
                opening.check_data(config, host, loader, number == 0)
                return next(loader).keys

    return run_ranks(4, rank)


@pytest.mark.parametrize("where, lists", [("local", [0]), ("remote", [0]), ("own", [0, 2, 2, 3])])
def test_one_rank_lists_the_shards_and_one_of_each_machine_looks_at_them(
    tiny_data: Path, tmp_path: Path, where: str, lists: list[int]
) -> None:
    def stat(number: int, files: Files, url: str, inner: Callable[[Files, str], Stat] = Files.stat) -> Stat:
        return inner(files, url)

    shards = [path.name for path in shutil.copytree(tiny_data / "train", tmp_path / "own/train").glob("*.tar")]
    shards.sort()
    with http_server(tiny_data) as server:
        first = f"{server.url}/train" if where == "remote" else f"{tiny_data}/train"
        open_indexed(first)
        log = tmp_path / "log"
        found = opened(tiny_data, [first, str(tmp_path / "own/train") if where == "own" else first], stat, log)
    asking = {"local": [0, 2], "remote": [], "own": lists}[where]
    asks = [f"{rank} asks {name}" for rank in asking for name in shards]
    assert sorted(log.read_text().splitlines()) == sorted([f"{rank} lists train" for rank in lists] + asks)
    keys = [key for rank in found for key in rank]
    assert len(keys) == len(set(keys)) == tiny_config(tiny_data).train.global_batch_size


def test_a_variable_in_a_url_names_the_shards_of_its_own_machine(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tiny_data, {"train": [{"path": "file://$SCRATCH/train"}]})
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    monkeypatch.setenv("SCRATCH", str(tiny_data))
    found = shared.find(config, modalities, 2)
    shutil.copytree(tiny_data / "train", tmp_path / "train")
    for machine in (tiny_data, tmp_path):
        monkeypatch.setenv("SCRATCH", str(machine))
        (source,) = shared.open_sources(config, modalities, Files(), found, "none")
        assert isinstance(source, Indexed) and source.urls == [f"{machine}/train/00000.tar"]


def test_a_machine_whose_copy_of_a_shard_is_truncated_ends_all_ranks(tiny_data: Path, tmp_path: Path) -> None:
    def stat(number: int, files: Files, url: str, inner: Callable[[Files, str], Stat] = Files.stat) -> Stat:
        return Stat(512, "") if number > 1 else inner(files, url)

    path = f"{tiny_data}/train"
    open_indexed(path)
    with pytest.raises(AssertionError, match=r"rank \d failed:(.|\n)*00000\.tar has 512 bytes, but its index says"):
        opened(tiny_data, [path, path], stat, tmp_path / "log")


def test_a_missing_folder_of_held_out_shards_is_reported_at_the_start(
    tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, missing = str(tiny_data / "train"), str(tmp_path / "missing")
    config = config_in(tmp_path, tiny_data, evaluate={"test": [here, missing]})
    with Loader(config, build_modalities(config.modalities, config.data.tokenizer)) as loader:
        opening.survey_data(config, loader)
    (message,) = [record.getMessage() for record in caplog.records if "evaluate.test" in record.getMessage()]
    assert missing in message and here not in message
