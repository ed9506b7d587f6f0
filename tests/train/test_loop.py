"""Whole runs on tiny shards: a finished run stays as it is, and what cannot work ends with a reason."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.train import loop
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import objectives, things, write_shards, write_tokenizer
from tests.train.faulty import STEPS, at_step, config_in, copied, events, logged, steps_of


def test_a_finished_run_stays_as_it_is_until_it_is_replaced_by_what_can_work(
    tmp_path: Path, tiny_data: Path, undisturbed: RunConfig
) -> None:
    config = copied(undisturbed, tmp_path)
    (config.run_dir / "mark").touch()
    assert run_ranks(1, train, config, True) == [exit_codes.DONE]
    smaller = write_tokenizer(tmp_path / "smaller.model", vocab_size=44)
    same_size = write_tokenizer(tmp_path / "same_size.model", backwards=True)
    refused = [
        ("model", {"num_heads": 1}, "resume", r"cannot change the model .*model.num_heads was 2 and is 1"),
        ("train", {"loss_weighting": "uncertainty"}, "resume", "loss_weighting was 'fixed' and is 'uncertainty'"),
        ("data", {"tokenizer": str(smaller)}, "resume",
         r"smaller.model has vocabulary size 44, and model.vocab_size is 48; set data.tokenizer"),
        ("data", {"tokenizer": str(same_size)}, "resume",
         r"was trained with another tokenizer .* e.g. the copy in .*tiny/tokenizer.model"),
        ("train", {"global_batch_size": 9, "num_microbatches": 2}, "overwrite", "batch_size 9 does not divide"),
        ("train", {"machine": str(tmp_path / "gone.json")}, "overwrite", "train.machine: .* is not a known machine"),
    ]  # fmt: skip
    for section, changes, option, message in refused:
        other = config_in(tmp_path, tiny_data, **{section: {**getattr(config, section).model_dump(), **changes}})
        with pytest.raises(AssertionError, match=message):
            run_ranks(1, train, other, option == "resume", option == "overwrite")
    assert run_config.load(config.run_dir / "config.yaml") == config
    assert (config.run_dir / "mark").exists() and steps_of(config) == list(range(1, STEPS + 1))
    unsized = {"train": {"steps": 2}, "model": {**config.model.model_dump(), "vocab_size": 0}}
    run_ranks(1, train, config_in(tmp_path, tiny_data, **unsized), False, True)
    assert not (config.run_dir / "mark").exists() and steps_of(config) == [1, 2]
    assert run_config.load(config.run_dir / "config.yaml").model.vocab_size == 48  # of its tokenizer
    unsized["data"] = {**config.data.model_dump(), "tokenizer": str(smaller)}
    with pytest.raises(AssertionError, match=r"cannot change the model .*model.vocab_size was 48 and is 44"):
        run_ranks(1, train, config_in(tmp_path, tiny_data, **unsized), True)


def test_a_restarted_worker_does_not_replace_the_run_a_second_time(
    tmp_path: Path, tiny_data: Path, undisturbed: RunConfig
) -> None:
    copied(undisturbed, tmp_path)
    config = config_in(tmp_path, tiny_data, train={"steps": 2})
    mark = config.run_dir / "mark"

    def start(job: str, restarted: bool) -> bool:
        os.environ["TORCHELASTIC_RUN_ID"] = job
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"] if restarted else "0"  # one machine is new
        before = mark.exists()
        train(config, overwrite=True)
        return before and not mark.exists()

    for job, restarted, replaced in [("first", False, True), ("first", True, False), ("second", True, True)]:
        mark.touch()
        # A second job whose first start died before it had replaced anything replaces the run in the next one.
        assert run_ranks(2, start, job, restarted) == [replaced] * 2


def test_resume_refuses_to_start_from_step_0(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    with pytest.raises(AssertionError, match=r"--resume: there is no finished checkpoint in .*leave --resume out"):
        run_ranks(2, train, config, True)
    with pytest.raises(AssertionError, match="give one of them, or neither"):
        run_ranks(1, train, config, True, True)
    assert not config.run_dir.exists()


def test_a_modality_that_no_sample_has_does_not_hang_two_ranks(tmp_path: Path, tiny_data: Path) -> None:
    write_shards(tmp_path / "silent", things(16), lacking=("audio",))
    data = {"train": [{"path": str(tmp_path / "silent")}], "num_workers": 1}
    config = config_in(tmp_path, tiny_data, data=data, train={"steps": 3})
    run_ranks(2, train, config)
    assert [record["routing"][0]["tokens"]["audio"] for record in logged(config)] == [0, 0, 0]
    pairs = {"contrastive/audio-text": 0, "contrastive/image-audio": 0, "contrastive/image-text": 8}
    assert all(record["counts"].items() >= pairs.items() for record in logged(config))
    idle = events(config, "idle_objective")
    assert [event["loss"] for event in idle] == ["contrastive/audio-text", "contrastive/image-audio"]
    assert "no sample with audio and text in 3 steps (24 samples)" in idle[0]["why"]


def test_a_run_that_learns_nothing_is_an_error(tmp_path: Path, tiny_data: Path) -> None:
    """All samples are of one group, so none is another's negative."""
    write_shards(tmp_path / "alike", [{**row, "group": "same"} for row in things(16)])
    config = config_in(tmp_path, tiny_data, data={"train": [{"path": str(tmp_path / "alike")}]}, train={"steps": 2},
                       objectives=objectives(captioning=None))  # fmt: skip
    with pytest.raises(AssertionError, match=r"there is nothing to learn: .*no negatives for audio-text in 2 steps"):
        run_ranks(1, train, config)
    assert [record["counts"]["contrastive/audio-text"] for record in logged(config)] == [8, 8]


def who_forks(config: RunConfig) -> tuple[list[str], list[tuple[int, int]], int]:
    """On a rank: the processes that it has when it begins to use a device, and of its data workers in step 2 (after a
    kill in step 1) the parent and that one's threads; and the server."""
    children: list[BaseProcess] = []
    parents: list[tuple[int, int]] = []

    @contextmanager
    def process_group(*args: float, plain: Any = loop.process_group) -> Iterator[torch.device]:
        children.extend(multiprocessing.active_children())
        with plain(*args) as device:
            yield device

    def look(loader: Loader) -> None:
        for pid in loader.worker_pids:
            (parent,) = re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            parents.append((int(parent), len(os.listdir(f"/proc/{parent}/task"))))

    loop.process_group = process_group  # type: ignore[assignment]
    at_step(1, lambda loader: os.kill(loader.worker_pids[0], signal.SIGKILL))
    at_step(2, look)
    assert train(config) == exit_codes.DONE
    return [child.name for child in children], parents, children[0].pid or 0


def test_data_workers_are_forked_by_a_process_that_is_older_than_the_use_of_a_device(
    tmp_path: Path, tiny_data: Path
) -> None:
    config = config_in(tmp_path, tiny_data, data={"num_workers": 1, "prefetch": 1}, train={"steps": 3})
    ((names, parents, server),) = run_ranks(1, who_forks, config)
    assert (names, parents) == (["data worker server"], [(server, 1)])
